"""What of the text encoder is fine-tuned: all of it, its top layers, nothing, or small additions by peft that are merged into it."""

import math
from typing import Any

import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from training.config import TrainConfig
from training.progress import quiet

_LINEAR = r".*\.layer\.\d+\.(?:.+\.)?(query|key|value|dense)"
_FEED_FORWARD = r".*\.layer\.\d+\.output\.dense"
_IA3 = r".*\.layer\.\d+\.(attention\.self\.(key|value)|output\.dense)"
# AdaLoRA plans by steps, a run here by its share done, for it may be bounded by seconds: so it is told thousandths of the run.
_ADALORA_STEPS, _ADALORA_INITIAL, _ADALORA_FINAL = 1000, 100, 300


class Regime:
    """The regime of one encoder during one training; the encoder is changed in place, by ``merge`` back to a plain one."""

    def __init__(self, encoder: PreTrainedModel, name: str, config: TrainConfig) -> None:
        self.name = name
        self._adapted: PeftModel | None = None
        self._step = 0
        if name in ("top_k", "frozen"):
            freeze_below(encoder, config.trainable_layers if name == "top_k" else 0)
        elif name != "full":
            pooler = {id(parameter) for parameter in encoder.pooler.parameters()} if getattr(encoder, "pooler", None) else set()
            with quiet():
                self._adapted = get_peft_model(encoder, _peft_config(name, config))
            for parameter in encoder.parameters():
                parameter.requires_grad_(parameter.requires_grad or id(parameter) in pooler)

    def penalty(self) -> Tensor | float:
        """Returns what AdaLoRA adds to the loss, lest its triplets stop being singular values; 0 for every other regime.

        The mean over matrices P of ``|P Pᵀ - 1|``, weighted as peft does in a forward pass that returns a loss (Zhang et al., ICLR 2023).
        """
        if self._adapted is None or self.name != "adalora":
            return 0.0
        spans = []
        for name, matrix in self._adapted.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                product = matrix @ matrix.T if "lora_A" in name else matrix.T @ matrix
                spans.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
        weight = float(self._adapted.peft_config["default"].orth_reg_weight)
        return weight * torch.stack(spans).mean()

    def after_step(self, done: float) -> None:
        """Lets AdaLoRA move rank between matrices; to be called after an optimizer step while its gradients are still there.

        Args:
            done: the share of the run behind it, in [0, 1].
        """
        if self._adapted is None or self.name != "adalora":
            return
        step, fixed = round(done * _ADALORA_STEPS), _ADALORA_STEPS - _ADALORA_FINAL
        if self._step < fixed <= step:
            step = fixed  # the call that fixes the ranks must not be skipped, nor made twice
        elif self._step == fixed:
            step = max(step, fixed + 1)
        self._adapted.base_model.update_and_allocate(step)
        self._step = step

    def merge(self) -> None:
        """Folds what was added into the encoder's own weights, so that it is a plain BERT again."""
        if self._adapted is not None:
            self._adapted.merge_and_unload()
            self._adapted = None

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint needs beside the weights: AdaLoRA's measure of importance and its ranks."""
        if self._adapted is None or self.name != "adalora":
            return {}
        allocator, pattern = self._adapted.base_model.rankallocator, self._adapted.peft_config["default"].rank_pattern
        measures = {name: getattr(allocator, name) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
        return {"step": self._step, "measures": measures, "rank_pattern": pattern}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what ``state_dict`` returned."""
        if self._adapted is None or not state:
            return
        self._step = state["step"]
        device = next(self._adapted.parameters()).device
        for name, values in state["measures"].items():
            setattr(self._adapted.base_model.rankallocator, name, {key: value.to(device) for key, value in values.items()})
        self._adapted.peft_config["default"].rank_pattern = state["rank_pattern"]


def freeze_below(encoder: PreTrainedModel, trainable_layers: int) -> None:
    """Leaves only the top encoder layers trainable, and a pooling layer where there is one; -1 leaves everything so."""
    if trainable_layers < 0:
        return
    encoder.requires_grad_(False)
    layers = encoder.encoder.layer
    for layer in layers[len(layers) - min(trainable_layers, len(layers)) :]:
        layer.requires_grad_(True)
    if getattr(encoder, "pooler", None):
        encoder.pooler.requires_grad_(True)


def rest_frozen(encoder: PreTrainedModel) -> None:
    """Turns dropout off in the layers that are frozen, which also makes them a third cheaper to run."""
    for layer in (encoder.embeddings, *encoder.encoder.layer):
        if not any(parameter.requires_grad for parameter in layer.parameters()):
            layer.eval()


def _peft_config(name: str, config: TrainConfig) -> PeftConfig:
    if name == "adapter":
        return IA3Config(target_modules=_IA3, feedforward_modules=_FEED_FORWARD)
    rank = config.adapter_rank
    if name == "lora":
        return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=config.dropout, target_modules=_LINEAR)
    first = max(math.ceil(1.5 * rank), rank + 1)
    return AdaLoraConfig(
        init_r=first,
        target_r=rank,
        lora_alpha=2 * first,
        lora_dropout=config.dropout,
        target_modules=_LINEAR,
        tinit=_ADALORA_INITIAL,
        tfinal=_ADALORA_FINAL,
        total_step=_ADALORA_STEPS,
    )
