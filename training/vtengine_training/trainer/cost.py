"""What a training step costs in floating-point operations and bytes. Estimates, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from vtengine.model import ModelConfig, VLModel, meta_model
from vtengine.model.layers import SwiGLU

MIB = 1 << 20
FORWARD, BACKWARD = 2, 4
"""Operations per parameter and row."""


@dataclass(frozen=True)
class ModelCost:
    """Parameters by part. `head`: the output projection (tied or not); embedding look-ups cost nothing. ends: all that
    is neither in a decoder layer nor in a vision block. per_patch: what a patch, without temporal copies, is
    multiplied with in the tower; the four of a visual token go through a merger together. model: without memory."""

    text: int
    vision: int
    head: int
    ends: int
    total: int
    per_patch: float
    model: VLModel

    @staticmethod
    def of(config: ModelConfig) -> ModelCost:
        """Counts the parameters of a model that is never made."""
        model = meta_model(config)
        total = sum(p.numel() for p in model.parameters())
        vision = sum(p.numel() for p in model.visual.parameters())
        text = sum(p.numel() for layer in model.layers for p in layer.parameters())
        blocks = sum(p.numel() for block in model.visual.blocks for p in block.parameters())
        head = config.text.vocab_size * config.text.hidden_size
        return ModelCost(text, vision, head, total - text - blocks, total, _per_patch(model), model)

    def training_flops(
        self, tokens: float, trained: float, patches: float, train_vision: bool = True, frozen: bool = False
    ) -> float:
        """Forward and backward of `tokens` packed tokens, logits at `trained` of them, `patches` encoded patches.

        Attention between tokens is left out: it is small where sequences are short against the width. frozen: weights
        get no gradients, because adapters learn; the work of these is left out.
        """
        both = FORWARD + (FORWARD if frozen else BACKWARD)
        vision = (both if train_vision else FORWARD) * self.per_patch * patches
        return both * (self.text * tokens + self.head * trained) + vision

    def activation_bytes(self, tokens: int, element_bytes: int, recompute: bool) -> int:
        """What the decoder layers keep of `tokens` packed tokens. recompute: their inputs, and what one layer keeps.

        A layer keeps the inputs of both norms and what comes of them, q, k and v before and after rotation (and before
        their norm, if they have one), what attention gives, gate and up, the gate's activation, and what goes into
        `down`. Embeddings carry what the tower adds to later layers. On CPUs norms keep one copy more.
        """
        model, text = self.model, self.model.config.text
        turned = text.q_size + text.kv_size
        kept = 4 * text.hidden_size + (4 if model.head_norms else 3) * turned + 4 * text.intermediate_size
        added = model.config.vision.feature_size - text.hidden_size
        layers = _all_layers(text.num_layers, kept, text.hidden_size, recompute)
        return element_bytes * tokens * (layers + added)

    def tower_bytes(self, patches: int, element_bytes: int, recompute: bool) -> int:
        """The same of the vision tower, where it learns: pixels, blocks, and what mergers norm and multiply."""
        tower = self.model.config.vision
        inner = 4 if isinstance(self.model.visual.blocks[0].mlp, SwiGLU) else 2
        kept = 10 * tower.hidden_size + inner * tower.intermediate_size
        mergers = tower.feature_size // tower.out_hidden_size
        ends = tower.compact_dim + (1 + 3 * mergers) * tower.hidden_size
        return element_bytes * patches * (_all_layers(tower.depth, kept, tower.hidden_size, recompute) + ends)

    def gathered_bytes(self, element_bytes: int, learns: bool) -> int:
        """What one of several ranks has whole all through a pass: the ends and two layers, torch's buffers that they
        came in, and where they learn a layer's gradients in the working dtype and, to be summed over the ranks, in
        float32."""
        layer = self.text // self.model.config.text.num_layers
        return element_bytes * (2 * self.ends + 3 * layer) + (element_bytes + 4) * layer * learns

    def ends_gradient_bytes(self, element_bytes: int) -> int:
        """The same two gradients of the ends, which are there when the backward pass is over."""
        return (element_bytes + 4) * self.ends

    def head_gradient_bytes(self, element_bytes: int) -> int:
        """Of the output projection: summed over chunks in float32, then in the working dtype."""
        return (4 if element_bytes == 4 else 4 + element_bytes) * self.head

    def adapter_bytes(self, element_bytes: int, adapters: int, ranks: int = 1, engine_copy: bool = False) -> int:
        """The same as `training_bytes` where `adapters` parameters learn in place of the weights. No reference: it is
        the model without them."""
        copy = self.total * element_bytes * engine_copy
        if ranks > 1:  # the model itself in pieces
            return copy + -(-(self.total * element_bytes + 16 * adapters) // ranks)
        masters = 0 if element_bytes == 4 else 4  # float32 adapters are their own
        return copy + self.total * element_bytes + (element_bytes + masters + 12) * adapters

    def training_bytes(
        self, element_bytes: int, reference: bool, train_vision: bool = True, ranks: int = 1, engine_copy: bool = False
    ) -> int:
        """Of a rank: weights, float32 masters, gradients and both moments, and the reference; activations come on top.

        engine_copy: an engine has a whole copy of the weights, as that of each of several ranks has.
        """
        copy = self.total * element_bytes * engine_copy
        trained = self.total if train_vision else self.total - self.vision
        if ranks > 1:  # masters, gradients, moments and the reference in pieces
            pieces = 4 * self.total + 12 * trained + (self.total * element_bytes if reference else 0)
            return copy + -(-pieces // ranks)
        live = self.total * element_bytes * (2 if reference else 1)
        masters = 0 if element_bytes == 4 else 4  # float32 parameters are their own
        return copy + live + trained * (masters + 12)


def _per_patch(model: VLModel) -> float:
    sizes = model.config.vision
    merged = 1 / sizes.merge_unit
    shares = {"patch_embed": sizes.compact_dim / sizes.patch_dim, "pos_embed": 0, "merger": merged, "deepstack": merged}
    return sum(p.numel() * shares.get(name.partition(".")[0], 1) for name, p in model.visual.named_parameters())


def _all_layers(layers: int, kept: int, inputs: int, recompute: bool) -> int:
    return layers * inputs + kept if recompute else layers * kept
