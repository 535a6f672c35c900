"""An engine as vLLM is one to a run: a model of its own, which knows the weights that it was given last."""

import torch
from tensordict import TensorDict
from transformers import AutoModelForCausalLM

from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.sampling import encode_prompts
from torchrl_maxmin.rollouts.engine import Sample


class CopyEngine:
    """Made from a policy's config, with weights that mean nothing until some are loaded."""

    def __init__(self, policy, tokenizer, *, top_k=0, top_p=1.0, **memory):
        with torch.random.fork_rng():
            torch.manual_seed(99)
            model = AutoModelForCausalLM.from_config(policy.model.config, dtype=policy.model.dtype).eval()
        strings = () if policy.stops is None else policy.stops.strings
        options = {"top_k": top_k, "top_p": top_p, "temperature": policy.temperature, "tokenizer": tokenizer}
        ends = {"eos_token_id": policy.eos_token_ids, "pad_token_id": policy.pad_token_id}
        self.policy = TokenPolicy(
            model, **ends, **options, stop_strings=strings, max_new_tokens=policy.max_new_tokens
        )
        self.memory, self.loads = memory, 0

    def load(self, weights):
        found = self.policy.model.load_state_dict(dict(weights), strict=False)
        assert not found.unexpected_keys
        self.policy.model.tie_weights()
        self.loads += 1

    def row(self, tokens):
        mask = torch.ones(1, len(tokens), dtype=torch.bool)
        return {"prompt_tokens": torch.tensor([list(tokens)]), "prompt_mask": mask}

    def generate(self, prompts, seeds, *, stop_early=True):
        return [self.answer(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def answer(self, prompt, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            (row,) = self.policy(TensorDict(self.row(prompt), [1]))
        real = row["action_mask"]
        return Sample(row["action"][real].tolist(), row["sample_log_prob"][real].tolist())

    def score(self, tokens):
        with torch.no_grad():
            logits = self.policy.model(torch.tensor([list(tokens)])).logits[0, :-1].double()
        return logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def engine_parts(folder, tokenizer, networks, prompts=("the film was", "it"), **options):
    """Networks from a saved model, and prompts of different lengths for them."""
    policy = TokenPolicy.from_pretrained(folder, tokenizer, max_new_tokens=6, **options)
    return networks(policy), encode_prompts(tokenizer, list(prompts))


def disturb(parameters, scale=0.05):
    """Take a step that is no small one, as an optimizer does: in place."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            step = torch.randn(parameter.shape, generator=generator)
            parameter += scale * step.to(parameter.dtype)
