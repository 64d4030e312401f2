"""Every knob of the system, once: type, bound, unit, default and one sentence.

`load_settings()` reads, strongest first: `DRZERO_SECTION__FIELD` variables, the sparse profile
`shared/profiles/<DRZERO_PROFILE>.toml` (default `demo`), the defaults below. An unknown key or a misspelt
variable is a `SettingsError` that names it. Secrets are no settings: they come by name from the environment
(`NCBI_API_KEY`, `HF_TOKEN`, `DRZERO_API_TOKEN`) and never enter this object, a log or a manifest.
"""

import difflib
import json
import math
import os
import tomllib
from collections.abc import Mapping
from datetime import date
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PREFIX = "DRZERO_"
SECRETS = frozenset({f"{PREFIX}API_TOKEN", f"{PREFIX}API_TOKEN_FILE"})  # no settings: read by shared/access.py alone
PROFILE_DIR = Path(__file__).parent / "profiles"
LISTS = frozenset(
    {"hop_ratio", "seed_mesh", "seed_keywords", "exclude_pmids", "languages", "exclude_publication_types", "sets"}
)

Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Bonus = Annotated[float, Field(ge=0, le=0.5)]
Language = Annotated[str, Field(pattern=r"^\s*[A-Za-z]{3}\s*$")]
ADDRESS = r"https?://[^/\s,]+(/[^\s,]*)?"
Address = Annotated[str, Field(pattern=f"^{ADDRESS}$")]
Addresses = Annotated[str, Field(pattern=rf"^{ADDRESS}(\s*,\s*{ADDRESS})*$")]  # for shared.balance.addresses_in


class SettingsError(ValueError):
    """A setting is unknown, misspelt or out of its bounds; the text says which and what is expected."""


class Section(BaseModel):
    """A frozen group of settings; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StorageSettings(Section):
    """Where files live: `data` is kept, `scratch` may be deleted at any time between runs."""

    data_dir: Path = Field(Path("data"), description="Kept files: corpus, index, runs, final weights.")
    scratch_dir: Path = Field(Path("scratch"), description="Checkpoints and caches; safe to delete.")
    min_free_gb: float = Field(2.0, ge=0, description="A stage refuses to start with less free disk than this, in GB.")
    budget_gb: float = Field(15.0, ge=0, description="Most that the kept files may take, in GB; 0: no limit.")


class LogSettings(Section):
    """How services write their log."""

    format: Literal["auto", "json", "console"] = Field(
        "auto", description="`auto` is readable text on a terminal and JSON lines elsewhere."
    )
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level written.")


class RedisSettings(Section):
    """Progress and events; every service also runs without Redis."""

    url: str | None = Field(
        None,
        pattern=r"^(rediss?|unix)://\S+$",
        description="`redis://host:port/db`; none means progress is only logged.",
    )
    timeout_s: Seconds = Field(1.0, description="Longest wait for one Redis command, in seconds.")


class IngestSettings(Section):
    """PubMed to corpus."""

    source: Literal["auto", "demo", "xml", "entrez"] = Field(
        "auto", description="`auto`: xml when xml_dir is set, entrez when query is set, else the shipped demo records."
    )
    xml_dir: Path | None = Field(None, description="Folder of PubMed XML files (.xml or .xml.gz), read recursively.")
    strict: bool = Field(False, description="Stop at the first malformed XML file instead of counting and skipping it.")
    workers: int = Field(0, ge=0, description="Processes that read XML files; 0 is one per core, at most 8.")
    require_abstract: bool = Field(True, description="Drop records without an abstract (counted).")
    min_abstract_words: int = Field(0, ge=0, description="Drop records whose abstract is shorter, in words (counted).")
    languages: tuple[Language, ...] = Field(
        (), description="Keep articles in these languages only, as PubMed codes them (`eng,fre`); none named keeps all."
    )
    exclude_publication_types: tuple[str, ...] = Field(
        (), description="Drop these publication types, such as `Letter,News`; names with a comma as a JSON list."
    )
    keep_retracted: bool = Field(False, description="Keep papers that were retracted instead of dropping them.")
    exclude_pmids: tuple[Path, ...] = Field(
        (), description="Text files of PMIDs, one a line, that never enter the corpus."
    )
    query: str | None = Field(None, description="PubMed search in Entrez syntax.")
    date_from: date | None = Field(None, description="First publication date of the query, YYYY-MM-DD.")
    date_to: date | None = Field(None, description="Last publication date of the query, YYYY-MM-DD.")
    max_records: Count = Field(
        9_999, description="Most records fetched from Entrez in one run; of more, the newest (above 9,999: by windows)."
    )
    email: str | None = Field(None, description="Contact address that NCBI asks of every E-utilities client.")
    entrez_url: Address = Field(
        "https://eutils.ncbi.nlm.nih.gov/entrez/eutils", description="Base address of the E-utilities."
    )
    entrez_batch: int = Field(200, ge=1, le=500, description="Records per EFetch call.")
    entrez_timeout_s: Seconds = Field(60.0, description="Longest wait for one E-utilities reply, in seconds.")
    entrez_tries: Count = Field(5, description="Attempts per E-utilities call before the run stops.")
    entrez_retry_budget: Count = Field(1000, description="Failed E-utilities calls of a run before it stops.")
    entrez_workers: int = Field(3, ge=1, le=32, description="EFetch calls in flight at once.")
    entrez_rate: int = Field(
        0,
        ge=0,
        description="Requests per second over all workers and machines; 0 is what NCBI allows: 3, 10 with a key.",
    )
    shard_rows: Count = Field(4096, description="Records per corpus shard.")


class EncoderSettings(Section):
    """The one text encoder, used for the index and for queries alike."""

    model: str = Field(
        "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext",
        description="Hugging Face id, folder, or `package:<module>[/<folder>]` for weights in a package.",
    )
    pooling: Literal["mean", "cls"] = Field("mean", description="How token vectors become one; part of the model.")
    max_tokens: int = Field(256, ge=8, le=8192, description="Longer texts are cut to this many tokens.")
    batch_size: Count = Field(
        64,
        description="Texts of max_tokens per forward pass; on a GPU more of shorter ones, up to as many tokens; on a "
        "CPU fewer, as many as its cache likes.",
    )
    device: str = Field("auto", description="`auto` takes a GPU when there is one; or `cpu`, `cuda`, `cuda:1`.")
    runtime: Literal["auto", "torch", "openvino"] = Field(
        "auto", description="`auto`: torch on a GPU; on a CPU the faster of the two, measured when the index is built."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of papers' vectors; `auto` is bfloat16 where the processor multiplies in it, else "
        "float32.",
    )
    query_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "float32",
        description="Precision of queries' vectors; in float32 every machine finds the same, `auto` and bfloat16 are "
        "faster and move scores by up to 0.002.",
    )
    threads: int = Field(0, ge=0, description="CPU threads of encoder and index; 0 is one per core.")


class IndexSettings(Section):
    """Which form the vectors are kept in, and where they are searched."""

    kind: Literal["auto", "flat", "hnsw", "ivf_sq", "ivf_pq"] = Field(
        "auto", description="`flat` is exact; the others find most of it in less time or memory; `auto` goes by size."
    )
    hnsw_m: int = Field(16, ge=4, le=64, description="Neighbours of a vector in the graph of hnsw.")
    hnsw_ef: Count = Field(128, description="Vectors that a search of hnsw keeps in view; more find more, slower.")
    lists: Count | None = Field(
        None, description="Lists of ivf_sq and ivf_pq; none: four times the square root of rows."
    )
    probes: Count = Field(32, description="Lists that a search of ivf_sq and ivf_pq reads; more find more, slower.")
    pq_bytes: Count = Field(64, description="Bytes of a vector in ivf_pq; must divide the vector's length.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="`cuda` is GPUs with room for the vectors in float16, else the CPU; `auto` is as the encoder.",
    )
    reserve_gb: float = Field(
        2.0, ge=0, description="Memory of each card that vectors leave free for batches, scores and neighbours, in GB."
    )


class RetrievalSettings(Section):
    """The search service."""

    host: str = Field("127.0.0.1", description="Address the service listens on.")
    port: Port = Field(8000, description="Port the service listens on.")
    url: Addresses = Field(
        "http://127.0.0.1:8000",
        description="Where clients find the service; several addresses, separated by commas, share the load.",
    )
    encoder: EncoderSettings = EncoderSettings()
    index: IndexSettings = IndexSettings()
    mode: Literal["dense", "bm25", "hybrid"] = Field(
        "hybrid", description="Search by vectors, by words, or by both, when a request names none."
    )
    fusion: Literal["scores", "ranks"] = Field(
        "scores", description="How hybrid makes one ranking of two: a sum of relative scores, or of reciprocal ranks."
    )
    dense_share: float = Field(0.5, ge=0, le=1, description="Weight of the vectors in hybrid; the words have the rest.")
    candidates: Count = Field(50, description="Papers of each ranking that hybrid looks at, at least.")
    rerank_model: str | None = Field(
        None, description="Cross-encoder (Hugging Face id or folder) for requests with `rerank`; none refuses them."
    )
    rerank_candidates: Count = Field(20, description="Papers that a cross-encoder reads per query.")
    top_k: Count = Field(3, description="Papers per query when a request names no number.")
    top_k_max: Count = Field(100, description="Largest number of papers per query that is accepted.")
    max_queries: Count = Field(512, description="Most queries in one request.")
    max_query_chars: Count = Field(2000, description="Longest query, in characters.")
    queue_queries: Count = Field(2048, description="Most queries that wait for the search thread; more get a 503.")
    deadline_s: Seconds = Field(30.0, description="A request that has waited longer is answered with 503, in seconds.")
    watch_s: float = Field(
        5.0, ge=0, description="Seconds between looks for a newly published index, which is then taken up; 0 is never."
    )
    cache: bool = Field(True, description="Keep results of queries in Redis, when there is one.")
    cache_ttl_s: Count = Field(86_400, description="How long Redis keeps a result, in seconds.")


LARGEST_GRAPH = 256  # the largest batch that SGLang would capture by itself on a card of 80 GB


class SglangSettings(Section):
    """Flags of the SGLang server (GPU solver)."""

    kv_tokens: Count | None = Field(
        None, description="Tokens in the KV pool of one copy; none: room for all that may run at once, at full length."
    )
    tp_size: Count = Field(1, description="GPUs over which one copy of the model is split.")
    dp_size: Count = Field(1, description="Copies of the model; `gpus` unless tp_size or this is given.")
    chunked_prefill_tokens: Count = Field(
        4096, description="Prompt tokens per forward pass, here and in rollouts; fewer take less memory."
    )
    cuda_graph_max_bs: Count | None = Field(
        None, description="Largest batch captured as a CUDA graph; none: all that may run at once, at most 256."
    )
    attention_backend: str = Field("triton", description="SGLang attention kernels; triton needs no extra wheel.")
    sampling_backend: str = Field("pytorch", description="SGLang sampling kernels.")
    grammar_backend: str = Field("xgrammar", description="SGLang's engine of guided decoding.")


class SolverSettings(Section):
    """The solver service, OpenAI-compatible."""

    engine: Literal["transformers", "sglang"] = Field(
        "sglang", description="`sglang` on GPUs, `transformers` (transformers serve) without one."
    )
    model: str = Field("Qwen/Qwen2.5-3B-Instruct", description="Hugging Face id, folder, or `package:<module>/<file>`.")
    in_place_of: str | None = Field(
        None, description="Model that the service was started with, where `model` is a run's; the driver sets it."
    )
    served_name: str = Field("solver", description="Model name that requests and /v1/models use.")
    host: str = Field("127.0.0.1", description="Address the service listens on.")
    port: Port = Field(8001, description="Port the service listens on.")
    url: Addresses = Field(
        "http://127.0.0.1:8001",
        description="Where clients find the service; several addresses, separated by commas, share the load.",
    )
    context_tokens: int = Field(3072, ge=256, description="Most tokens of prompt and answer together.")
    max_running: Count = Field(64, description="Most requests generated at once; the rest wait in the queue.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "bfloat16", description="Precision of the weights; on a CPU `auto` is bfloat16 where the processor has it."
    )
    max_waiting: Count = Field(1024, description="Most requests running and waiting; more are refused with 503.")
    threads: int = Field(0, ge=0, description="CPU threads of the transformers engine; 0 lets torch decide.")
    sglang: SglangSettings = SglangSettings()

    @property
    def running_per_copy(self) -> int:
        """Requests that one copy of the model runs at once; SGLang splits `max_running` among the copies."""
        return math.ceil(self.max_running / self.sglang.dp_size)

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KV pool of one copy of the model."""
        return self.sglang.kv_tokens or self.running_per_copy * self.context_tokens

    @property
    def cuda_graph_max_bs(self) -> int:
        """The largest batch that one copy captures as a CUDA graph; a larger one is several times slower a token."""
        return self.sglang.cuda_graph_max_bs or min(LARGEST_GRAPH, self.running_per_copy)


class BiomedicalSettings(Section):
    """Weights of the parts that only the reward variant `biomedical` adds; every part is measured in any variant."""

    citation_weight: Bonus = Field(0.1, description="Weight of: the cited PMIDs were seen in this rollout.")
    gene_weight: Bonus = Field(0.05, description="Weight of: the gene and protein symbols exist.")
    reasoning_weight: Bonus = Field(0.05, description="Weight of: the question asks for more than a definition.")
    novelty_weight: Bonus = Field(0.1, description="Weight of: the question is not like a recent one.")
    novelty_window: Count = Field(512, description="Questions of earlier steps that a new one is compared with.")
    grounded: bool = Field(
        True, description="Difficulty is paid only for an answer that stands in the seed paper or a search result."
    )
    novelty_threshold: float = Field(
        0.8, ge=0, lt=1, description="Similarity up to which a question is new; at 1 it is a copy."
    )
    synonym_credit: float = Field(
        1.0, ge=0, le=1, description="What a listed synonym counts as an answer; an exact match counts 1."
    )


class RewardSettings(Section):
    """Reward of a proposed question: format_weight·F + D, and what the variant adds."""

    variant: Literal["paper", "biomedical"] = Field(
        "paper", description="`paper`: F and D alone; `biomedical`: further parts, and synonyms count as answers."
    )
    attempts: int = Field(5, ge=2, description="Solver attempts per question (n of the difficulty formula).")
    min_attempts: int = Field(
        2, ge=2, description="Attempts that must have been judged; with fewer the rollout is invalid, not wrong."
    )
    attempt_deadline_s: Seconds = Field(120.0, description="Longest time of one solver attempt, in seconds.")
    question_deadline_s: Seconds = Field(300.0, description="Longest time of all attempts at a question, in seconds.")
    format_form: Literal["graded", "gated"] = Field(
        "gated", description="`gated`: 0 unless question and answer stand; `graded`: every part counts by itself."
    )
    gate_at: float | None = Field(
        None, gt=0, le=1, description="Mean F of a step at which `graded` becomes `gated` for good; none: never."
    )
    format_weight: float = Field(0.5, ge=0, le=1, description="Weight of the format score F in the reward.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature of the solver's attempts.")
    max_turns: Count = Field(5, description="Most assistant turns of one solver attempt.")
    max_new_tokens: Count = Field(512, description="Most new tokens per turn of a solver attempt.")
    max_tool_tokens: Count = Field(512, description="Longest search result shown to the solver, in its tokens.")
    worked_examples: int = Field(0, ge=0, le=2, description="Worked examples shown to the solver as earlier turns.")
    concurrency: Count = Field(64, description="Solver attempts in flight at once, per reward worker.")
    biomedical: BiomedicalSettings = BiomedicalSettings()

    @model_validator(mode="after")
    def _enough_attempts_can_be_judged(self) -> "RewardSettings":
        if self.min_attempts > self.attempts:
            raise ValueError(
                f"trainer.reward.min_attempts is {self.min_attempts}, but only trainer.reward.attempts = "
                f"{self.attempts} are made"
            )
        return self


class GuardSettings(Section):
    """When a training that goes wrong is stopped, with its last good checkpoint kept."""

    steps: Count = Field(3, description="Bad steps in a row after which training stops; the first one warns.")
    min_entropy: float = Field(0.02, ge=0, description="Mean token entropy, in nats, of a collapsed policy.")
    max_length_growth: float = Field(3.0, gt=1, description="Mean response length over that of the first steps.")
    min_reward_share: float = Field(
        0.25, ge=0, lt=1, description="Mean reward over the best mean so far, below which the reward has collapsed."
    )
    max_repeated_share: Share = Field(
        0.5, description="Share of a step's questions that are also asked about another paper of that step."
    )
    flat_steps: Count = Field(5, description="Steps without any variance in the groups after which the run says so.")


class QuestionSettings(Section):
    """Questions that a trained proposer writes for the solver's training, and how they are verified."""

    papers: Count = Field(
        400, description="Papers of each round from which questions are written; never among the proposer's seeds."
    )
    candidates: Count = Field(4, description="Questions that the proposer writes about each paper.")
    enough: int = Field(
        0,
        ge=0,
        description="Papers with a well-formed candidate after which no others are asked about; 0: ask about all.",
    )
    tries: Count = Field(
        3, description="Answers of the round's solver to a candidate with the evidence before it, and as many without."
    )
    min_with_evidence: int = Field(1, ge=0, description="Of these, right ones that a candidate needs with evidence.")
    max_without: int = Field(0, ge=0, description="Right ones that it may have without: more are known by heart.")
    evidence_tokens: Count = Field(1024, description="The evidence before a question is cut to this many tokens.")
    held_out_share: float = Field(
        0.1, gt=0, lt=1, description="Share of the papers whose questions are kept for evaluation; at least one paper."
    )
    likeness: float = Field(0.8, gt=0, le=1, description="Of two questions more alike than this one is dropped.")


class SolverTrainingSettings(Section):
    """The solver's own training: GRPO on the round's questions. Turns and their lengths are those of an attempt."""

    steps: Count = Field(50, description="Optimizer steps.")
    prompts_per_step: Count = Field(64, description="Questions per step.")
    rollouts_per_prompt: int = Field(5, ge=2, description="Answers per question: the group size of GRPO.")
    eval_questions: Count = Field(32, description="Kept-out questions answered before and after, at most.")
    prompt_tokens: Count = Field(1024, description="Longest prompt, tool schema included.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature of the answers.")
    learning_rate: float = Field(1e-6, gt=0, description="AdamW's step size.")


class EvaluationSettings(Section):
    """What base and rounds are evaluated on, beside the questions that a round has kept out."""

    sets: tuple[Path, ...] = Field(
        (), description="Files of questions: PubMedQA's or BioASQ's JSON, or JSON lines; their papers are never seeds."
    )
    most: Count | None = Field(None, description="Questions of each set that are asked, the first ones; none: all.")
    concurrency: Count = Field(64, description="Questions in flight at once.")
    safety: bool = Field(True, description="Ask base and round the prompts of `safety_prompts.jsonl`, too.")


class ActorSettings(Section):
    """The model that is trained and how verl updates it."""

    model: str = Field("Qwen/Qwen2.5-3B-Instruct", description="Hugging Face id, folder, or `package:<module>/<file>`.")
    device: Literal["cuda", "cpu"] = Field("cuda", description="Where verl trains.")
    rollout_engine: Literal["sglang", "transformers"] = Field(
        "sglang", description="`sglang` on GPUs; `transformers` is our verl plugin for machines without one."
    )
    learning_rate: float = Field(1e-6, gt=0, description="AdamW's step size.")
    warmup_share: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    max_grad_norm: float = Field(0.1, gt=0, description="Gradients are clipped to this norm.")
    micro_batch: Count = Field(
        4,
        description="Sequences of full length per forward and backward pass on one device; a packed pass takes as many "
        "tokens.",
    )
    attention: str = Field(
        "varlen",
        description="Attention of the trained model: `varlen` is ours, which packs sequences end to end instead of "
        "padding them; anything else is a transformers implementation, such as `sdpa`.",
    )
    compile_layers: bool = Field(
        False, description="Compile the layers of a model with `varlen` attention: half a minute at the start."
    )
    master_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of the stored weights.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "bfloat16", description="Precision of the forward and backward pass; `auto` as for the solver."
    )
    gradient_checkpointing: bool = Field(True, description="Trade compute for memory in the backward pass.")
    offload: bool = Field(False, description="Keep parameters and optimizer state in host memory between phases.")
    offload_update: bool = Field(
        False,
        description="Keep weights, gradients and optimizer state in host memory during updates too and step there: "
        "slow, least GPU memory.",
    )
    lora_rank: int = Field(0, ge=0, description="Rank of LoRA adapters; 0 trains all weights.")
    lora_alpha: Count = Field(32, description="LoRA adapters are scaled by lora_alpha over lora_rank.")
    gpus: Count = Field(1, description="Devices on this node (1 on a CPU); the setting `gpus` unless this is given.")
    nodes: Count = Field(1, description="Nodes of the Ray cluster.")
    kv_tokens: Count | None = Field(
        None, description="Tokens in the KV pool of a rollout engine; none: room for its rollouts at full length."
    )
    rollout_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "bfloat16", description="Precision of the rollout weights; `auto` as for the solver."
    )
    rollout_threads: int = Field(0, ge=0, description="CPU threads of the transformers rollout; 0 lets torch decide.")

    @property
    def packed(self) -> bool:
        """Whether sequences are trained end to end, without padding."""
        return self.attention == "varlen"


class TrainerSettings(Section):
    """Seeds, rollouts, reward, updates and evaluation of one run."""

    iterations: Count = Field(
        1, description="Rounds of a run; in each a proposer is trained, then a solver on that proposer's questions."
    )
    round: Count = Field(1, description="Round that a process works for; the driver sets it.")
    role: Literal["proposer", "solver"] = Field(
        "proposer", description="Model that a process trains; the driver sets it."
    )
    run: str = Field("demo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Name of the run's folder.")
    seed: int = Field(42, ge=0, description="Seed of everything that draws at random.")
    host: str = Field("127.0.0.1", description="Address of the run page.")
    port: Port = Field(8002, description="Port of the run page, /health and /metrics.")
    seeds: Count = Field(500, description="Seed papers drawn for training.")
    eval_seeds: Count = Field(32, description="Held-out seed papers, disjoint from the training seeds.")
    min_abstract_words: int = Field(100, ge=0, description="Shorter abstracts are no seeds.")
    seed_mesh: tuple[str, ...] = Field((), description="Only papers with one of these MeSH terms are seeds.")
    seed_keywords: tuple[str, ...] = Field((), description="Only papers that name one of these words are seeds.")
    exclude_pmids: tuple[Path, ...] = Field(
        (), description="Text files of PMIDs, one a line, that are never seeds: those of every evaluation set."
    )
    document_tokens: Count = Field(256, description="The seed document in the prompt is cut to this many tokens.")
    hop_ratio: tuple[Weight, Weight, Weight, Weight] = Field(
        (4, 3, 2, 1), description="Seeds with 1, 2, 3 and 4 hops; not all 0."
    )
    steps: Count = Field(50, description="Optimizer steps.")
    prompts_per_step: Count = Field(256, description="Seed prompts per step.")
    rollouts_per_prompt: Count = Field(1, description="Rollouts per prompt: the group size of GRPO.")
    advantage: Literal["hrpo", "grpo"] = Field(
        "hrpo", description="`hrpo`: rewards are compared within a hop across the batch; `grpo`: within a prompt."
    )
    small_group: Count = Field(4, description="Hop groups with fewer valid rollouts follow small_group_rule.")
    small_group_rule: Literal["batch", "zero"] = Field(
        "batch", description="A small hop group is compared with the whole `batch`, or gets advantage `zero`."
    )
    max_invalid_share: Share = Field(
        0.25, description="Share of rollouts lost to services above which a step is refused and made again."
    )
    max_refusals: Count = Field(3, description="Refusals of one step in a row after which training stops.")
    prompt_tokens: Count = Field(1536, description="Longest prompt, tool schema included.")
    response_tokens: Count = Field(2560, description="Longest rollout, tool results included.")
    max_turns: Count = Field(5, description="Most assistant turns of a rollout.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature of the rollouts.")
    prompts: Literal["full-v1", "short-v1"] = Field(
        "full-v1",
        description="Set of prompts of both roles; `short-v1` suits models of a few hundred million weights.",
    )
    worked_examples: int = Field(0, ge=0, le=2, description="Worked examples shown to the proposer as earlier turns.")
    guided_tool_call: bool = Field(
        False, description="On the first turn of a prompt with more than one hop, decode only well-formed search calls."
    )
    turn_tokens: Count = Field(1024, description="Most new tokens per assistant turn.")
    max_tool_tokens: Count = Field(512, description="Longest search result shown to the proposer, in its tokens.")
    search_top_k: Count = Field(3, description="Papers per search query in rollouts.")
    agent_workers: Count = Field(4, description="verl processes that drive rollouts.")
    reward_workers: Count = Field(2, description="verl processes that compute rewards.")
    storage_units: Count = Field(8, description="verl processes that hold rollouts between phases.")
    save_every: Count = Field(10, description="Steps between checkpoints.")
    keep_checkpoints: Count = Field(2, description="Checkpoints kept; older ones are deleted.")
    patience_s: Seconds = Field(
        180.0, description="How long a call waits for search or solver to come back before the run stops, in seconds."
    )
    start_patience_s: Seconds = Field(
        1800.0, description="The same before the first step: a service may load a model or compile kernels, in seconds."
    )
    rollout_deadline_s: Seconds = Field(
        600.0,
        description="Longest time of one rollout, in seconds; after it no further turn begins and the rollout is "
        "invalid.",
    )
    stall_s: Seconds = Field(1800.0, description="Training without any sign of progress for so long is stopped.")
    object_store_gb: float = Field(
        8.0, gt=0, description="Shared memory of Ray's object store, in GB; a cluster that is joined has its own."
    )
    ray_address: str | None = Field(
        None, description="Ray cluster to join (host:port); without it Ray is started on this machine for the run."
    )
    price_per_hour: float = Field(0.0, ge=0, description="What an hour of this machine costs; 0: no cost is recorded.")
    restarts: int = Field(2, ge=0, description="How often training that crashed is resumed before the run stops.")
    actor: ActorSettings = ActorSettings()
    reward: RewardSettings = RewardSettings()
    guards: GuardSettings = GuardSettings()
    questions: QuestionSettings = QuestionSettings()
    solver: SolverTrainingSettings = SolverTrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @property
    def rollouts_per_card(self) -> int:
        """Rollouts of a step that each card generates."""
        return math.ceil(self.prompts_per_step * self.rollouts_per_prompt / (self.actor.gpus * self.actor.nodes))

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KV pool of a card's rollout engine."""
        return self.actor.kv_tokens or self.rollouts_per_card * (self.prompt_tokens + self.response_tokens)

    @model_validator(mode="after")
    def _seeds_fill_a_step(self) -> "TrainerSettings":
        if self.seeds < self.prompts_per_step:
            raise ValueError(
                f"trainer.seeds is {self.seeds}, but one step takes trainer.prompts_per_step = {self.prompts_per_step}"
            )
        return self

    @model_validator(mode="after")
    def _some_hop_is_drawn(self) -> "TrainerSettings":
        if sum(self.hop_ratio) == 0:
            raise ValueError("trainer.hop_ratio is 0,0,0,0, but at least one number of hops must be drawn")
        return self


class Settings(Section):
    """All settings of one installation."""

    profile: str = Field("demo", description="Name of the profile these settings were read from.")
    gpus: Count = Field(1, description="GPUs of this machine, each shared by trainer and solver; divides the batch.")
    gpu_plan: Literal["refuse", "warn"] = Field(
        "refuse", description="What a GPU service does at its start when `python -m shared.memory_plan` exceeds a card."
    )
    storage: StorageSettings = StorageSettings()
    log: LogSettings = LogSettings()
    redis: RedisSettings = RedisSettings()
    ingest: IngestSettings = IngestSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    solver: SolverSettings = SolverSettings()
    trainer: TrainerSettings = TrainerSettings()

    @model_validator(mode="after")
    def _searches_ask_for_what_is_served(self) -> "Settings":
        wanted, served = max(self.retrieval.top_k, self.trainer.search_top_k), self.retrieval.top_k_max
        if wanted > served:
            raise ValueError(
                f"retrieval.top_k_max is {served}, but retrieval.top_k or trainer.search_top_k asks for {wanted}"
            )
        return self


def known_variables() -> dict[str, tuple[str, ...]]:
    """All settable variables: name → path of keys, e.g. `DRZERO_INGEST__XML_DIR` → ("ingest", "xml_dir")."""
    names: dict[str, tuple[str, ...]] = {}

    def walk(section: type[BaseModel], path: tuple[str, ...]) -> None:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(field.annotation, (*path, name))
            else:
                names[PREFIX + "__".join((*path, name)).upper()] = (*path, name)

    walk(Settings, ())
    return names


def profiles() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(path.stem for path in PROFILE_DIR.glob("*.toml"))


def read_profile(name: str) -> dict[str, Any]:
    """The sparse values of one profile; `SettingsError` when there is no such profile."""
    path = PROFILE_DIR / f"{name}.toml"
    if name not in profiles():
        raise SettingsError(f"{PREFIX}PROFILE is {name!r}: expected one of {', '.join(profiles())}")
    return tomllib.loads(path.read_text(encoding="utf-8"))


def build_settings(environ: Mapping[str, str]) -> Settings:
    """Settings from an environment; pure but for reading the profile file.

    An empty variable counts as unset, because Compose passes unset ones on as empty strings.
    """
    ours = {key: value for key, value in environ.items() if key.startswith(PREFIX) and value != ""}
    given = {key: value for key, value in ours.items() if key not in SECRETS}
    known = known_variables()
    for key in given:
        if key not in known:
            names = [name.removeprefix(PREFIX) for name in known]
            close = difflib.get_close_matches(key.removeprefix(PREFIX), names, n=1, cutoff=0.6)
            hint = f"; did you mean {PREFIX}{close[0]}?" if close else "; `make settings` lists all"
            raise SettingsError(f"unknown variable {key}{hint}")
    profile = given.get(f"{PREFIX}PROFILE", "demo")
    values = read_profile(profile)
    values["profile"] = profile
    for key, text in given.items():
        _put(values, known[key], text)
    _share_out_gpus(values)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(_explain(error, profile)) from error


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """`settings` with other values by dotted name, e.g. {"trainer.actor.model": "/models/x"}; validated again."""
    values = settings.model_dump()
    for name, value in changes.items():
        *sections, last = name.split(".")
        section = values
        for key in sections:
            section = section[key]
        section[last] = value
    return Settings.model_validate(values)


def as_environment(settings: Settings) -> dict[str, str]:
    """The variables from which `build_settings` makes these settings again, for a child process."""
    values = settings.model_dump(mode="json")

    def text(path: tuple[str, ...]) -> str:
        value: Any = values
        for key in path:
            value = value[key]
        if value is None:
            return ""
        return json.dumps(value) if isinstance(value, list) else str(value)

    return {name: text(path) for name, path in known_variables().items()}


@cache
def load_settings() -> Settings:
    """The settings of this process, read once from its environment."""
    return build_settings(os.environ)


def _put(values: dict[str, Any], path: tuple[str, ...], text: str) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
    values[path[-1]] = _items(text) if path[-1] in LISTS else text


def _items(text: str) -> Any:
    """The values of a variable that has several: `4,3,2,1`, or a JSON list where one holds a comma."""
    try:
        return json.loads(text) if text.startswith("[") else text.split(",")
    except ValueError:
        return text.split(",")


def _share_out_gpus(values: dict[str, Any]) -> None:
    """Trainer and solver use all GPUs unless told otherwise; a wrong number is left to the schema's own error."""
    if not str(values.get("gpus", "")).isdecimal():
        return
    values.setdefault("trainer", {}).setdefault("actor", {}).setdefault("gpus", values["gpus"])
    sglang = values.setdefault("solver", {}).setdefault("sglang", {})
    if "tp_size" not in sglang:
        sglang.setdefault("dp_size", values["gpus"])


def _explain(error: ValidationError, profile: str) -> str:
    known = known_variables()
    lines = []
    for item in error.errors():
        keys = [str(part) for part in item["loc"]]
        if item["type"] == "value_error":  # a rule over several settings, whose own text names them
            lines.append(str(item["ctx"]["error"]))
            continue
        variable = PREFIX + "__".join(keys).upper()
        while keys and item["type"] != "extra_forbidden" and variable not in known:
            keys.pop()  # one value of several, as in hop_ratio.2
            variable = PREFIX + "__".join(keys).upper()
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown setting {'.'.join(keys)} in profile {profile}")
        else:
            lines.append(f"{'.'.join(keys)} is {item['input']!r}: {item['msg']} (variable {variable})")
    return "; ".join(dict.fromkeys(lines))
