"""What a training run is told: frozen dataclasses, checked when they are made.

Every field is a key of a recipe and of the command line (nested ones with a dot: ``--model.hidden_size 64``).
All errors are ``ValueError`` and name the key and the value.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from apollo_dist.pretrain.fields import at_least, one_of, option, require
from apollo_dist.pretrain.optimizer_config import OPTIMIZERS, AdamWConfig, JsonOptimizer, OptimizerConfig

ENGINES = ("deepspeed", "fsdp1", "fsdp2", "ddp")
FSDP1_STRATEGIES = ("full", "grad_op", "hybrid", "none")
PRECISIONS = ("fp32", "bf16", "bf16-pure")
WEIGHTS = ("int8",)
CHECKPOINTING = ("none", "full", "selective")
ATTENTIONS = ("sdpa", "flash_attention_2", "eager")
LOSSES = ("plain", "chunked", "liger")
TOKEN_DTYPES = ("uint8", "uint16", "uint32")

# Keys that may differ between a run and its resumption: they say where and how often to write, never what to compute.
RUN_KEYS = frozenset({
    "background_checkpoints", "checkpoint_every", "deepspeed_config", "eval_every", "eval_sequences",
    "final_eval_sequences", "keep_checkpoints", "max_skipped_steps", "output", "override", "peak_tflops", "resume",
    "step_timeout", "stop_after", "tensorboard", "timeout_minutes", "wandb",
})  # fmt: skip
# Keys that say where and in which pieces to compute: a resumed run may change them, and changes rounding with them.
COMPUTE_KEYS = ("activation_checkpointing", "attention", "compile", "loss", "loss_chunk")
PLACE_KEYS = frozenset({"engine", "fsdp1_strategy", "layerwise", "micro_batch_size", *COMPUTE_KEYS})


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the LLaMA: untied embeddings, no biases."""

    vocab_size: int = option("tokens in the vocabulary (256 for bytes)")
    hidden_size: int = option("width of the residual stream")
    intermediate_size: int = option("width of the MLP")
    num_layers: int = option("transformer blocks")
    num_heads: int = option("attention heads")
    num_kv_heads: int | None = option("heads of keys and values, each for several of queries; default: num_heads", None)
    norm_eps: float = option("epsilon of RMSNorm", 1e-6)
    init_std: float = option("standard deviation of the initial weights", 0.02)

    def __post_init__(self) -> None:
        at_least(
            1,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
        )
        require(
            self.num_heads % self.kv_heads == 0,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads {self.num_heads}",
        )
        head = self.hidden_size / self.num_heads
        require(head % 2 == 0, "model.hidden_size", self.hidden_size, f"an even multiple of num_heads {self.num_heads}")

    @property
    def kv_heads(self) -> int:
        """``num_kv_heads``, or by default as many as ``num_heads``."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from: ``path``, or ``dataset``, or with neither the Python standard library's source."""

    path: str | None = option("text files, JSONL, token .bin files; a file, a folder or a glob", None)
    validation: str | None = option("the same for validation; default: a part of path is split off", None)
    dataset: str | None = option("name or folder of a Hugging Face dataset, streamed", None)
    dataset_config: str | None = option("configuration of the dataset, such as en", None)
    train_split: str = option("split of the dataset to train on", "train")
    validation_split: str = option("split of the dataset to validate on", "validation")
    tokenizer: str | None = option("name or folder of a Hugging Face tokenizer; default: bytes", None)
    text_key: str = option("key of the text in JSONL records and datasets", "text")
    token_dtype: str = option("dtype of .bin files: " + ", ".join(TOKEN_DTYPES), "uint16")
    validation_fraction: float = option("share of the files (or of a lone file) split off for validation", 0.05)

    def __post_init__(self) -> None:
        one_of(TOKEN_DTYPES, "data.token_dtype", self.token_dtype)
        fraction = self.validation_fraction
        require(0 < fraction < 1, "data.validation_fraction", fraction, "between 0 and 1")
        if self.path is not None and self.dataset is not None:
            raise ValueError(f"--data {self.path!r} and --dataset {self.dataset!r} are both given: choose one")
        if self.validation is not None and self.path is None:
            raise ValueError(f"data.validation is {self.validation!r} but no --data is given to train on")
        if self.dataset is not None and self.tokenizer is None:
            raise ValueError(f"--dataset {self.dataset!r} needs --tokenizer NAME (the paper's runs use t5-base)")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    model: ModelConfig
    optimizer: OptimizerConfig | JsonOptimizer
    data: DataConfig
    recipe: str = option("name of a recipe, or the path of a YAML file", "tiny")
    engine: str = option("deepspeed (the default if a --deepspeed_config is given), fsdp1, fsdp2 or ddp", "ddp")
    fsdp1_strategy: str = option("what fsdp1 shards: full, grad_op, hybrid (full within each node) or none", "full")
    layerwise: bool = option("update inside the backward pass: fsdp2, or ddp in a single process", False)
    deepspeed_config: str | None = option("DeepSpeed's JSON; ds_configs/README.md says what it decides", None)
    precision: str = option(
        "fp32; bf16: autocast under ddp, bf16 compute over fp32 weights under fsdp; bf16-pure: bf16 weights alone, "
        "rounded stochastically",
        "fp32",
    )
    weights: str | None = option(
        "int8: linear layers in INT8 with one scale a row (ddp, fsdp2; needs torchao); default: as precision says", None
    )
    activation_checkpointing: str = option(
        "none; full: decoder layers are computed again in the backward pass; selective: but their matrix products",
        "none",
    )
    attention: str = option("sdpa (torch's kernels), flash_attention_2 (needs flash-attn) or eager", "sdpa")
    compile: bool = option("compile each decoder layer with torch.compile", False)
    loss: str = option(
        "plain; chunked: no logits of the whole micro-batch, but loss_chunk tokens at a time; liger: likewise, by the "
        "kernel of liger-kernel, on CUDA",
        "plain",
    )
    loss_chunk: int = option("tokens whose logits the chunked loss has at a time", 1024)
    seed: int = option("of the initial weights, the order of the data and the projections", 0)
    sequence_length: int = option("tokens per sequence")
    batch_size: int = option("sequences per step, over all ranks")
    micro_batch_size: int | None = option("sequences per rank and forward pass; default: batch_size / ranks", None)
    steps: int = option("optimizer steps of the whole run; the learning rate's schedule ends here")
    warmup_steps: int = option("steps of linear warm-up", 0)
    min_lr_ratio: float = option("the cosine ends at this share of the peak learning rate", 0.1)
    gradient_clipping: float = option("largest global gradient norm; 0: no clipping", 0.0)
    max_skipped_steps: int = option("steps in a row left out for gradients that are not finite before the run ends", 10)
    eval_every: int = option("steps between validations; 0: at the end only", 0)
    eval_sequences: int | None = option("validation sequences of those; default: all", None)
    final_eval_sequences: int | None = option("validation sequences of the last one; default: all", None)
    output: str = option("folder of everything the run writes; default runs/RECIPE-OPTIMIZER", "")
    checkpoint_every: int = option("steps between checkpoints; 0: none", 0)
    keep_checkpoints: int = option("how many checkpoints to keep", 2)
    background_checkpoints: bool = option("write checkpoints while training goes on, from copies in CPU memory", False)
    resume: bool = option("continue from the newest checkpoint in the output folder", False)
    override: str | None = option("with resume: keys that may differ from the checkpoint's, such as steps,lr", None)
    stop_after: int | None = option("stop, with a checkpoint, after this step of the schedule", None)
    timeout_minutes: float = option("a collective that takes longer ends the job", 10.0)
    step_timeout: float = option("seconds for a step before every rank ends with its stacks; 0: no watchdog", 0.0)
    peak_tflops: float | None = option("of one device, for the MFU; default: by its name, where that is known", None)
    tensorboard: bool = option("write TensorBoard events too (needs tensorboard)", False)
    wandb: str | None = option("log to this Weights & Biases project too (needs wandb)", None)

    def __post_init__(self) -> None:
        one_of(ENGINES, "engine", self.engine)
        one_of(FSDP1_STRATEGIES, "fsdp1_strategy", self.fsdp1_strategy)
        one_of(PRECISIONS, "precision", self.precision)
        if self.weights is not None:
            one_of(WEIGHTS, "weights", self.weights)
        one_of(CHECKPOINTING, "activation_checkpointing", self.activation_checkpointing)
        one_of(ATTENTIONS, "attention", self.attention)
        one_of(LOSSES, "loss", self.loss)
        require(self.peak_tflops is None or self.peak_tflops > 0, "peak_tflops", self.peak_tflops, "positive")
        at_least(
            1,
            loss_chunk=self.loss_chunk,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            steps=self.steps,
            eval_sequences=self.eval_sequences,
            final_eval_sequences=self.final_eval_sequences,
            keep_checkpoints=self.keep_checkpoints,
            stop_after=self.stop_after,
        )
        at_least(
            0,
            seed=self.seed,
            gradient_clipping=self.gradient_clipping,
            max_skipped_steps=self.max_skipped_steps,
            eval_every=self.eval_every,
            checkpoint_every=self.checkpoint_every,
            step_timeout=self.step_timeout,
        )
        require(
            0 <= self.warmup_steps < self.steps, "warmup_steps", self.warmup_steps, f"in [0, steps), steps {self.steps}"
        )
        require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "in [0, 1]")
        require(self.timeout_minutes > 0, "timeout_minutes", self.timeout_minutes, "positive")
        if (self.engine == "deepspeed") != (self.deepspeed_config is not None):
            raise ValueError(
                f"engine is {self.engine!r} and deepspeed_config {self.deepspeed_config!r}: "
                "--engine deepspeed needs --deepspeed_config FILE, and no other engine takes one"
            )

        if getattr(self.optimizer, "stochastic_rounding", None) and self.precision != "bf16-pure":
            raise ValueError(
                f"optimizer.stochastic_rounding with --precision {self.precision}: the step updates fp32 weights, "
                "which lose nothing to rounding; leave it out, or take --precision bf16-pure"
            )
        if self.layerwise:
            self._check_layerwise()

    def _check_layerwise(self) -> None:
        if self.engine not in ("fsdp2", "ddp"):
            raise ValueError(
                f"--layerwise with --engine {self.engine}: gradients are not ready inside the backward pass; take "
                "fsdp2, or ddp in a single process"
            )
        if self.gradient_clipping:
            raise ValueError(
                f"--layerwise with gradient_clipping {self.gradient_clipping}: the norm of all gradients is known only "
                "after they have been used; pass --gradient_clipping 0, the limiter of APOLLO takes its part"
            )
        if type(self.optimizer) in (AdamWConfig, JsonOptimizer):  # not this library's
            known = ", ".join(name for name, kind in OPTIMIZERS.items() if kind is not AdamWConfig)
            raise ValueError(f"--layerwise is for {known}; the optimizer is {self.optimizer.name}")

    @property
    def output_folder(self) -> Path:
        """``output``, or by default ``runs/RECIPE-OPTIMIZER``."""
        return Path(self.output or f"runs/{Path(self.recipe).stem}-{self.optimizer.name}")

    @property
    def last_step(self) -> int:
        """The step after which this process stops."""
        return self.steps if self.stop_after is None else min(self.stop_after, self.steps)

    def computed(self) -> dict[str, object]:
        """All keys, flat (``model.hidden_size``), that decide what is computed: what a resumed run must share."""
        nested = dataclasses.asdict(self)
        nested["optimizer"]["name"] = self.optimizer.name
        flat: dict[str, object] = {}
        for key, value in nested.items():
            if isinstance(value, dict):
                flat |= {f"{key}.{inner}": v for inner, v in value.items()}
            elif key not in RUN_KEYS:
                flat[key] = value
        return {key: list(v) if isinstance(v, tuple) else v for key, v in flat.items()}
