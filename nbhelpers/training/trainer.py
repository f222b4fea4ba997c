"""`LeanGRPOTrainer`: TRL's GRPOTrainer with defaults that fit the machine, clear errors, and nothing lost on a stop.

Only the files of hooks and this one touch TRL's private parts. Here these are:

    _generate_single_turn                   the engine writes the completions
    _logs                                   the newest rollout, for what the panel shows
    _tokenizer                              the engine's tokenizer
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import trl
from datasets import IterableDataset
from trl.extras.profiling import profiling_context

from nbhelpers import engines, gpu
from nbhelpers.memory.room import Reserved
from nbhelpers.models import chat
from nbhelpers.rewards import REASONING, Sample, Tags, question_of, text_of
from nbhelpers.rewards.guard import SECONDS, guard_all

from . import config, rows, settings
from .config import LeanGRPOConfig
from .hooks import making
from .lean_hooks import LeanStepHooks
from .prompt_hooks import PromptHooks
from .resume_hooks import ResumeHooks
from .signal_hooks import SignalHooks
from .stage_hooks import StageHooks
from .step_hooks import ONE_CARD_EACH
from .stop_when import SILENCE, Stopper, StopWhen
from .whole_hooks import WholeHooks

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset, DatasetDict, IterableDatasetDict
    from peft import PeftConfig, PeftModel
    from transformers import (
        BitsAndBytesConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )
    from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc

ENGINES_KNOW = {"stop_strings", "min_new_tokens"}  # of transformers' names in `generation_kwargs`


class LeanGRPOTrainer(StageHooks, SignalHooks, ResumeHooks, LeanStepHooks, PromptHooks, WholeHooks, trl.GRPOTrainer):
    """TRL's GRPOTrainer, made for one small machine. These things differ:

    - the precision is this machine's when `args` is a `LeanGRPOConfig` (or None);
    - reward functions are guarded (`guard.guard_all`): a wrong length is refused by name; one exception, NaN or call
      that takes longer than `args.reward_seconds` costs one batch's rows of that function, not the run;
    - `state.samples` holds the newest rollout as `Sample`s, for callbacks such as `panel.Live`;
    - log-probabilities and gradients come from the lean step (`lean_step.LeanStep`);
    - weights that are trained in bf16 themselves (`loader.load(..., train="all")`) are rounded by chance;
    - completions are written by an engine from the weights that are trained, and end with a stop string too
      (`generation_kwargs={"stop_strings": [...]}`);
    - a prompt that ends with an assistant message is continued there; what is rewarded is what the model wrote;
    - `chat_template_kwargs` are kept with the tokenizer, so that `evaluate` asks as the training does;
    - an interrupt (Ctrl-C, the notebook's stop button, SIGTERM, SIGHUP) or an error saves what was learned to
      `args.output_dir`; after an interrupt `train()` returns as if the run had ended, so the next cell works;
    - a group whose rewards are all equal has advantages of exactly 0, and is replaced where `args.dynamic_sampling`
      says so;
    - completions may get longer in stages (`LeanGRPOConfig(stages=[...])`);
    - checkpoints are complete or absent, and `train(resume_from_checkpoint="auto")` resumes from the newest one as
      if nothing had happened: the same prompts, seeds and updates, in a later epoch and inside a rollout too.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): The policy, e.g. from `loader.load`; trained in place.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`): Reward functions (`rewards.Reward`), reward models or their
            names. TRL's None, for rewards of an environment, is left to TRL.
        args (`GRPOConfig`, *optional*): `LeanGRPOConfig("runs/grpo")` if not given.
        train_dataset (`Dataset` or `IterableDataset`): Rows with a `prompt` column, e.g. `task.train`.
        eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers, quantization_config,
            peft_config, tools, rollout_func, environment_factory (*optional*): As in TRL's GRPOTrainer.
        engine (`str` or `engines.Engine`, *optional*): What writes the completions: "auto", "graph", "vllm", "hf" (see
            `engines.choose`) or an engine. None leaves it to TRL, as does what only TRL can do (`use_vllm=True`).
        budget_gb (`float`, *optional*): What torch may allocate in this process, weights and optimizer included, GB
            (10^9 bytes); None for what the card has.
        max_skipped_steps (`int`): Updates in a row that may be skipped for gradients that are not finite, before the
            run stops.
        lean (`bool`): False computes log-probabilities and gradients as TRL does, to compare.
        stop_when (`StopWhen`, *optional*): Ends a run that learns nothing, is done, or is gamed, and says why.
        correct (`Callable[[str, str], bool]`, *optional*): Given a completion's text and the row's `answer`, whether it
            is right, in whatever form: measured and shown as `right`, never rewarded. `rewards.right` if not given.
        tags (`rewards.Tags`): The form of which `in_form` is the share, for panel and `stop_when`; `preset.tags`.

    Raises ValueError for what `check` refuses, and for an engine together with an argument that only TRL's own
    generation knows; RewardError for two reward functions of one name.
    """

    @making
    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: "RewardFunc | list[RewardFunc] | None" = None,
        args: trl.GRPOConfig | None = None,
        train_dataset: "Dataset | IterableDataset | None" = None,
        eval_dataset: "Dataset | IterableDataset | DatasetDict | IterableDatasetDict "
        "| dict[str, Dataset | IterableDataset] | None" = None,
        processing_class: "PreTrainedTokenizerBase | ProcessorMixin | None" = None,
        reward_processing_classes: "PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None" = None,
        callbacks: "list[TrainerCallback] | None" = None,
        optimizers: "tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]" = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        tools: "list[Callable] | None" = None,
        rollout_func: "RolloutFunc | None" = None,
        environment_factory: "EnvironmentFactory | dict[str, EnvironmentFactory] | None" = None,
        *,
        engine: str | engines.Engine | None = "auto",
        budget_gb: float | None = None,
        max_skipped_steps: int = 10,
        lean: bool = True,
        stop_when: StopWhen | None = None,
        correct: "Callable[[str, str], bool] | None" = None,
        tags: Tags = REASONING,
    ):
        config.check_trl()
        if args is None:
            args = LeanGRPOConfig("runs/grpo")
        settings.refuse(args)
        owned = environment_factory is not None
        train_dataset, eval_dataset = rows.looked_at(train_dataset, eval_dataset, args, owned)
        funcs = None
        if reward_funcs is not None:
            seconds = args.reward_seconds if isinstance(args, LeanGRPOConfig) else SECONDS
            given = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
            funcs = guard_all(given, seconds)
            settings.refuse_weights(args, len(funcs))
        super().__init__(
            model, funcs, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset,
            processing_class=processing_class, reward_processing_classes=reward_processing_classes,
            callbacks=callbacks, optimizers=optimizers, quantization_config=quantization_config,
            peft_config=peft_config, tools=tools, rollout_func=rollout_func, environment_factory=environment_factory,
            budget_gb=budget_gb, max_skipped_steps=max_skipped_steps, lean=lean,
        )  # fmt: skip
        self._begin_stages(args.stages or () if isinstance(args, LeanGRPOConfig) else ())
        self.engine, self._said_too_long = self._engine(engine), False
        self._refuse_long_prompts()
        rounds = args.dynamic_sampling if isinstance(args, LeanGRPOConfig) else 0
        if rounds and isinstance(self.train_dataset, IterableDataset):
            raise ValueError("dynamic_sampling draws other questions from anywhere in train_dataset, which a stream "
                             "cannot do: set dynamic_sampling=0, or make a datasets.Dataset of it")  # fmt: skip
        self._begin_signal(correct, rounds, tags)
        self.add_callback(Stopper(SILENCE, ends=False) if stop_when is None else Stopper(stop_when))
        for live in self._panels():
            live.method = self._name
            live.engine = self.engine  # asks its probes with the engine that writes the completions
            live.tags, live.kept_however_it_ends = self.tags, True
            asked = live.probes[0].decoding.chat_template_kwargs if live.probes else None
            if asked is not None and asked != chat.template_kwargs(self._tokenizer):
                print(
                    f"The panel's probes were asked with chat_template_kwargs={asked}, and will be again, and this run "
                    f"trains with {self.chat_template_kwargs}: give evaluate.ask the same"
                )

    def _engine(self, engine: str | engines.Engine | None) -> engines.Engine | None:
        """The engine that writes the completions; None: TRL does. Raises ValueError for one that excludes `args`."""
        args, kind = self.args, self.accelerator.distributed_type
        asked = {
            "use_vllm=True": args.use_vllm,
            "use_transformers_continuous_batching=True": args.use_transformers_continuous_batching,
            "generation_kwargs": bool(self._generation_kwargs.keys() - ENGINES_KNOW),
            "cache_implementation": args.cache_implementation is not None,
            f"{kind}": kind not in ONE_CARD_EACH,
        }
        why, kv_bits = next((name for name, wanted in asked.items() if wanted), None), vars(args).get("kv_bits", 16)
        if engine is None or why is not None:
            if why is not None and engine not in ("auto", None):
                raise ValueError(f"engine={engine!r} and {why} exclude each other: leave one of them out")
            if "stop_strings" in self._generation_kwargs:
                raise ValueError(
                    f"TRL's own generation, taken for {why or 'engine=None'}, cannot look for stop_strings: leave "
                    "either out"
                )
            if kv_bits != 16:
                raise ValueError(f"kv_bits={kv_bits} is an option of the graph engine, and TRL's own generation, taken "
                                 f"for {why or 'engine=None'}, has none: leave either out")  # fmt: skip
            if args.use_vllm and args.vllm_importance_sampling_correction and not self._sampling(1, 0).plain:
                print(
                    "TRL's vLLM reports probabilities after top_p, top_k, min_p and repetition_penalty, so the "
                    "correction weighs a token by what they kept, and a long completion hardly counts: set "
                    "vllm_importance_sampling_correction=False, or engine='vllm' in place of use_vllm=True"
                )
            print(f"engine: TRL's own, for {why or 'engine=None'}")
            return None
        if args.mask_truncated_completions and "stop_strings" in self._generation_kwargs:
            raise ValueError(
                "mask_truncated_completions=True takes what ends with one of the stop_strings for cut off and would "
                "mask it: leave either out"
            )
        self._sampling(1, 0)  # raises for what is out of range
        model = self.accelerator.unwrap_model(self.model)
        sizes: dict[str, Any] = {"kv_bits": kv_bits}
        if engine == "vllm":  # allocates its memory once, at the start
            sizes["rows"] = args.per_device_train_batch_size * self._steps_per_generation
            sizes["max_length"] = sum(self._longest_row()[1:])
        chosen = engines.choose(engine, model, self._tokenizer, budget_gb=self.budget_gb, **sizes)
        if chosen.name != "vllm":
            gpu.grow_blocks()
        return chosen

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "engine": "TRL's own" if self.engine is None else self.engine.name}

    def _refuse_long_prompts(self) -> None:
        """ValueError for a prompt that is longer than all that the model can hold."""
        if self.engine is None or self.environment_factories is not None:  # each writes the prompts on
            return
        limit = self.accelerator.unwrap_model(self.model).config.get_text_config().max_position_embeddings
        why = f"and all that the model can hold is {limit}: leave the row out"

        def lengths(prompts: list[Any]) -> list[int]:
            return [len(ids) for ids in self._tokenize_prompts(prompts)[0]]

        rows.refuse_longer(self.train_dataset, "train_dataset", limit, lengths, why)
        for data in rows.several(self.eval_dataset):
            rows.refuse_longer(data, "eval_dataset", limit, lengths, why)

    def _reserved(self) -> Reserved:
        asleep = 0 if self.engine is None else self.engine.asleep
        return super()._reserved()._replace(handed_back=asleep)

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: list | None,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """TRL's hook: token ids of a completion for each prompt, and what the engine reports of each."""
        if self.engine is None or images is not None or multimodal_fields:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        self._say_if_too_long(prompt_ids)
        n = num_generations  # a group's prompts are adjacent and the same: the engine gets one of them
        grouped = all(prompt_ids[i] == prompt_ids[i - i % n] for i in range(len(prompt_ids)))
        n = n if grouped and len(prompt_ids) % n == 0 else 1
        # each process draws with its own seed: with few prompts a group is spread over several
        seed = int(torch.randint(2**62, ())) + self.accelerator.process_index
        sampling = replace(self._sampling(n, seed), past_limit=self.engine.name != "vllm")
        with profiling_context(self, f"engine.{self.engine.name}"):
            written = self.engine.generate(prompt_ids[::n], sampling)
        if sampling.stop_strings:
            self._ended = [completion.reason != engines.base.LENGTH for completion in written]
        return [completion.token_ids for completion in written], [completion.logprobs for completion in written]

    @property
    def _generation_kwargs(self) -> dict[str, Any]:
        """What `args.generation_kwargs` asks for."""
        asked: Any = self.args.generation_kwargs or {}  # a str, in TRL's words, only until GRPOConfig has read it
        return {name: value for name, value in asked.items() if value is not None}

    def _sampling(self, num_generations: int, seed: int) -> engines.Sampling:
        """How an engine draws so many completions of each prompt."""
        stops = self._generation_kwargs.get("stop_strings", ())
        return engines.Sampling(
            self.max_completion_length, num_generations=num_generations, temperature=self.temperature,
            top_k=max(0, self.top_k or 0), top_p=self.top_p, min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty, min_tokens=self._generation_kwargs.get("min_new_tokens", 0),
            stop_ids=tuple(self.eos_token_ids), stop_strings=(stops,) if isinstance(stops, str) else tuple(stops),
            seed=seed,
        )  # fmt: skip

    def _say_if_too_long(self, prompt_ids: list[list[int]]) -> None:
        """TRL generates past the positions that a model was made for without a word; here there is one, once."""
        limit, longest = self.model.config.get_text_config().max_position_embeddings, max(map(len, prompt_ids))
        if longest + self.max_completion_length > limit and not self._said_too_long:
            self._said_too_long = True
            print(f"A prompt of {longest} tokens and max_completion_length={self.max_completion_length} go past the "
                  f"{limit} positions that this model was made for: what is written there may be poor. This is said "
                  "once.")  # fmt: skip

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL; callbacks find the newest rollout in `state.samples`.

        The last entry of `state.log_history`, the summary of the run, has the newest step's numbers too, as with TRL
        where logging_steps left some of them to it.
        """
        vars(self.state)["samples"] = self.samples()  # TrainerState has no such field; the panel reads it
        super().log(logs, start_time)
        *before, entry = self.state.log_history
        if "train_runtime" in entry:
            self.state.log_history[-1] = next((log for log in reversed(before) if "reward" in log), {}) | entry

    def samples(self) -> list[Sample]:
        """The newest rollout of all processes: prompt, completion, reward by function and advantage of each row."""
        names = list(self._logs["rewards"])
        columns = (
            self._logs["prompt"],
            self._logs["completion"],
            self._logs["advantages"],
            *self._logs["rewards"].values(),
        )
        return [
            Sample(question_of(prompt), text_of(completion), dict(zip(names, scores, strict=True)), advantage)
            for prompt, completion, advantage, *scores in zip(*columns, strict=False)
        ]
