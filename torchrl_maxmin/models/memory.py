"""Bytes and seconds of a language model's jobs, from its config alone: sampling, scoring, training.

Every job is a dry run of the passes that the package makes, see :mod:`torchrl_maxmin.models.dry_run`; nothing
here knows an architecture. Masks are full: each response is as long as it may be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from maxmin_kernels import token_log_probs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torchrl_maxmin.core.allocator import MAPPED, USUAL
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.decoding import LARGE_VOCABULARY, GivenNumbers
from torchrl_maxmin.models.dry_run import Footprint, Trace, fake_copy, shallow_depths, traced
from torchrl_maxmin.models.language import SampledLogProbs
from torchrl_maxmin.models.loading import import_transformers
from torchrl_maxmin.models.rates import Rates
from torchrl_maxmin.models.sequences import backbone_of, hidden_states, takes

__all__ = ["Jobs", "without_weights"]

Build = Callable[[Any], nn.Module]
_NAMES = {"policy": "AutoModelForCausalLM", "trunk": "AutoModel"}


def without_weights(config: Any, kind: str = "policy", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of a config, in evaluation mode, on whatever device is current (meta and fake ones included).

    Args:
        config: of a Hugging Face model.
        kind: ``"policy"``, a causal language model, or ``"trunk"``.
        dtype: of its weights.
    """
    return getattr(import_transformers(), _NAMES[kind]).from_config(config, dtype=dtype).eval()


def states_of(model: nn.Module, rows: int, prompt: int, response: int) -> Tensor:
    """Hidden states [B, R, H] that predict responses, as ``predicting_states`` gets them."""
    tokens = torch.zeros(rows, prompt + response - 1, dtype=torch.int64)
    states = hidden_states(backbone_of(model), tokens, torch.ones_like(tokens, dtype=torch.bool))
    return nn.functional.pad(states[:, prompt - 1 :], (0, 0, 0, 0))


def log_probs_of(model: Any, states: Tensor, entropy: bool = False) -> Tensor:
    """Log-probabilities of all tokens of responses, and their entropies behind them."""
    output = model.get_output_embeddings()
    flat = states.flatten(0, 1).clone()  # which a mask does
    targets = torch.zeros(len(flat), dtype=torch.int64)
    found = token_log_probs(flat, output.weight, targets, entropy=entropy, bias=getattr(output, "bias", None))
    return torch.cat([x for x in found if x is not None])


def values_of(states: Tensor, columns: int) -> Tensor:
    """Values [B, R, columns] by heads in float32."""
    head = nn.Parameter(torch.empty(columns, states.shape[-1]))
    return nn.functional.linear(states.float(), head)


class Jobs:
    """Traces of what is done with a model.

    Args:
        config: of a Hugging Face causal language model.
        device: ``"cpu"`` or ``"cuda"``, for the sizes of chunks.
        rates: for the time; None leaves it 0.

    Raises:
        UserError: by its methods, for a model that decides by values which operations it does.
    """

    def __init__(self, config: Any, device: str = "cpu", rates: Rates | None = None):
        self.config, self.device, self.rates = config, device, rates
        with torch.device("meta"):
            self.depths = shallow_depths(without_weights(config))

    def _traced(self, builds: Sequence[Build], run: Callable[..., Trace]) -> Trace:
        """The trace of ``run(counted, *models)`` for models with all their layers."""

        def once(config: Any) -> Trace:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                models = [build(config) for build in builds]
            with FakeTensorMode():
                return run(Footprint(self.device, self.rates), *map(fake_copy, models))

        try:
            return traced(self.config, self.depths, once)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            words = next(iter(str(error).strip().splitlines()), "no more is known")
            raise UserError(
                f"no dry run of a {self.config.model_type} model ({type(error).__name__}: {words}): "
                "what it does depends on values, which a plan has not"
            ) from error

    def prefill(self, build: Build, rows: int, tokens: int) -> Trace:
        """Read prompts [rows, tokens] for their next token; what is kept is the cache."""

        def run(counted: Footprint, model: Any) -> Trace:
            with torch.no_grad(), counted:
                cache = _read(model, rows, tokens)  # noqa: F841 - alive until it is counted
                return counted.trace()

        return self._traced([build], run)

    def step(self, build: Build, rows: int, tokens: int) -> Trace:
        """Sample one more token behind ``tokens`` others; the cache of these counts too."""

        def run(counted: Footprint, model: Any) -> Trace:
            with torch.no_grad(), counted:
                cache = _read(model, rows, tokens)
                counted.timeline.clear()
                counted.seconds = 0.0
                _read(model, rows, 1, cache, tokens)
                return counted.trace()

        return self._traced([build], run)

    def drawing(self, rows: int, vocabulary: int, temperature: float, *, given: bool) -> float:
        """Seconds to draw a token a row from its scores, and to take its log-probability.

        Args:
            rows: responses at once.
            vocabulary: tokens that there are.
            temperature: of the sampling.
            given: draw by given numbers, as processes do that work as one, and large vocabularies anyhow.
        """
        if self.rates is None:
            return 0.0
        with FakeTensorMode():
            scores, tokens = torch.empty(rows, vocabulary), torch.zeros(rows, 1, dtype=torch.int64)
            numbers = GivenNumbers(torch.empty(rows, 1), 1, temperature)
            sampled = SampledLogProbs(temperature, scores=scores)
            with Footprint(self.device, self.rates) as counted:
                scores = scores.to(torch.float32, copy=True)
                sampled(tokens, scores)
                if given or vocabulary >= LARGE_VOCABULARY:
                    numbers(tokens, scores).argmax(-1)
                else:
                    warmed = scores if temperature == 1.0 else scores / temperature
                    torch.multinomial(warmed.softmax(-1), 1)
        return counted.seconds + self.rates.token_seconds

    def scoring(
        self, build: Build, rows: int, prompt: int, response: int, *, log_probs: bool, columns: int = 0
    ) -> Trace:
        """Read responses without gradients.

        Args:
            build: makes the model.
            rows: responses at once.
            prompt: tokens of a prompt.
            response: tokens of a response.
            log_probs: take the log-probabilities of the tokens.
            columns: values a token; 0 takes none.
        """

        def run(counted: Footprint, model: Any) -> Trace:
            with torch.no_grad(), counted:
                states = states_of(model, rows, prompt, response)
                _ = log_probs_of(model, states) if log_probs else None
                _ = values_of(states, columns) if columns else None
                return counted.trace()

        return self._traced([build], run)

    def training(
        self,
        builds: Sequence[Build],
        losses: Sequence[Callable[[Any], Tensor]],
        *,
        accumulate: bool,
        reuse: bool = True,
        mapped: bool = False,
    ) -> Trace:
        """Forward passes and one backward pass of them all; the gradients that are left are not counted.

        Args:
            builds: make the models, of which all that requires gradients is trained.
            losses: make a scalar of each; the backward pass is that of their sum.
            accumulate: whether gradients are added to what is there, else the old ones go between the passes.
            reuse: whether there are any before.
            mapped: whether large blocks of the forward passes are mapped one by one.
        """

        def run(counted: Footprint, *models: nn.Module) -> Trace:
            trained = dict.fromkeys(p for model in models for p in model.parameters() if p.requires_grad)
            counted.mapped = MAPPED if mapped else USUAL
            with counted:
                for p in trained if reuse else ():
                    p.grad = torch.empty_like(p)
                total, ends = torch.zeros(()), []
                for model, loss in zip(models, losses, strict=True):
                    total = total + loss(model)
                    ends.append(len(counted.timeline))
                for p in () if accumulate else trained:
                    p.grad = None
                counted.mapped = USUAL
                total.backward()
                # the second half of the backward pass is where gradients may outgrow what they free
                trace = counted.trace(*ends, (ends[-1] + len(counted.timeline)) // 2)
            gradients = sum(p.nbytes for p in trained)
            return replace(trace, peaks=tuple(peak - gradients for peak in trace.peaks))

        return self._traced(builds, run)


def _read(model: Any, rows: int, tokens: int, cache: Any = None, before: int = 0) -> Any:
    """One call of ``generate``; returns the cache."""
    inputs = {
        "input_ids": torch.zeros(rows, tokens, dtype=torch.int64),
        "attention_mask": torch.ones(rows, before + tokens, dtype=torch.int64),
        "position_ids": torch.arange(before, before + tokens).expand(rows, tokens),
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    taken = model.get_base_model() if hasattr(model, "get_base_model") else model
    output = model(**{name: value for name, value in inputs.items() if takes(taken, name)})
    return output.get("past_key_values")
