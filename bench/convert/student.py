"""The converted model as a transformers model of its own type, `linearized`: the teacher's architecture, other attention.

Importing this module registers the type, so `AutoModelForCausalLM.from_pretrained("converted/")` works, and so do
`generate` and `lm_eval --model hf`.

Shape legend: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from bench.convert.cache import LinearizedCache
from bench.convert.far import far_heads
from bench.convert.fit import AttentionShape, attention_shape
from bench.convert.layer import Branch, LinearizedAttention
from bench.convert.spec import LayerPlan
from bench.errors import UserError

MODEL_TYPE = "linearized"
COPIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)
"""What programs look for in any model's configuration, copied from the teacher's."""


@strict
class LinearizedConfig(PreTrainedConfig):
    """Configuration of a converted model.

    Args:
        base: the teacher's configuration as a dictionary.
        plans: for every layer the fields of its `LayerPlan`, or None where softmax is kept.
        conversion: where the weights come from: recipe, data hash, tokens, teacher.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ("cache",)

    base: dict | None = None
    plans: list | None = None
    conversion: dict | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for name in COPIED:
            if self.base is not None and self.base.get(name) is not None:
                kwargs[name] = self.base[name]
        super().__post_init__(**kwargs)


def linearized_config(teacher: Any, plans: list[LayerPlan | None]) -> LinearizedConfig:
    """The configuration of a teacher's student.

    Args:
        teacher: the teacher's configuration.
        plans: one plan a layer, None where softmax stays.
    """
    base = {key: value for key, value in teacher.to_dict().items() if key not in ("architectures", "dtype", "_name_or_path")}
    return LinearizedConfig(base=base, plans=[None if plan is None else plan.model_dump(mode="json") for plan in plans])


class LinearizedForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose converted layers keep a state of constant size.

    Args:
        config: what it is made of.
    """

    config_class = LinearizedConfig
    base_model_prefix = "lm"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _is_stateful = True  # no rollback: transformers then refuses assisted decoding

    def __init__(self, config: LinearizedConfig) -> None:
        super().__init__(config)
        base = dict(config.base or {})
        if "model_type" not in base or len(config.plans or []) != base.get("num_hidden_layers"):
            raise ValueError("config.json of a converted model needs the teacher's configuration and one plan a layer")
        base_config = AutoConfig.for_model(base.pop("model_type"), **base)
        self.lm: Any = AutoModelForCausalLM.from_config(base_config, attn_implementation="sdpa")
        # Before the converted layers are in: it would draw their linear maps and zero their biases as a Llama's.
        self.post_init()
        self.plans = [None if plan is None else LayerPlan.model_validate(plan) for plan in config.plans or []]
        for index, (block, plan) in enumerate(zip(self.blocks(), self.plans, strict=True)):
            if plan is not None:
                shape = teacher_shape(block, index)
                far = far_heads(plan, len(self.plans), shape.n_kv_heads).get(index, [])
                block.self_attn = LinearizedAttention(block.self_attn, plan, shape, index, far)
        self.keeps_softmax = any(plan is None for plan in self.plans)
        self.decoders: dict[Any, Any] = {}

    def blocks(self) -> Any:
        """The decoder layers."""
        return self.lm.model.layers

    def converted(self) -> dict[int, LinearizedAttention]:
        """Converted layers by index."""
        return {index: block.self_attn for index, block in enumerate(self.blocks()) if self.plans[index] is not None}

    def ablate(self, branch: Branch) -> None:
        """Lets only the window or only the mixer of every converted layer speak, or both again."""
        self.decoders.clear()
        for layer in self.converted().values():
            layer.ablation = branch

    def new_cache(self) -> LinearizedCache:
        """An empty cache."""
        return LinearizedCache(self.lm.config, [plan is not None for plan in self.plans])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LinearizedCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Runs the model as transformers models run; see `LlamaForCausalLM.forward`.

        Args:
            input_ids: [B, T].
            attention_mask: [B, S], 0 at padding; S = T, or T plus what the cache has seen.
            position_ids: [B, T]; None counts real tokens.
            cache: a cache of this class's `new_cache`, or None.
            inputs_embeds: [B, T, D] instead of input_ids.
            labels: [B, T] for a next-token loss; -100 is ignored.
            use_cache: return a cache.
            logits_to_keep: number of last positions, or their indices; 0 keeps all.
            **kwargs: handed to the decoder.

        Returns:
            Logits [B, T', V] and, if asked for, loss and cache.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None, "give input_ids or inputs_embeds"
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = self.new_cache()
        if attention_mask is not None and position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -given.shape[1] :]
        if labels is None and self._may_record(input_ids, cache):
            from bench.convert.decode import recorded_step

            assert input_ids is not None
            assert cache is not None
            logits_BV = recorded_step(self, cache, input_ids, position_ids)
            if logits_BV is not None:
                return CausalLMOutputWithPast(logits=logits_BV[:, None], cache=cache)
        outputs = self.lm.model(
            input_ids=input_ids,
            attention_mask=attention_mask if self.keeps_softmax else None,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            padding_BT=_padding(attention_mask, given.shape[1]),
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(outputs.last_hidden_state[:, keep])
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, cache=cache if use_cache else None, hidden_states=outputs.hidden_states
        )

    def _may_record(self, input_ids: Tensor | None, cache: Any) -> bool:
        """Whether a call is a step on a GPU that could replay a CUDA graph."""
        if input_ids is None or input_ids.shape[1] != 1 or not input_ids.is_cuda or self.training:
            return False
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return False
        return isinstance(cache, LinearizedCache) and cache.steps_on_graph and cache.get_seq_length() > 0

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Last hidden states [B, T, D] of sequences without padding."""
        return self.lm.model(input_ids=input_ids, use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """The head."""
        return self.lm.lm_head(hidden)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.lm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm.get_output_embeddings()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` leaves it to `forward` to make the cache."""
        return False


def _padding(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Which of the last `length` positions are real [B, T], or None if all are."""
    if attention_mask is None or length == 1:  # one new token is always real, and asking would wait for the device
        return None
    recent_BT = attention_mask[:, -length:].bool()
    return None if bool(recent_BT.all()) else recent_BT


def build_student(teacher: Any, plans: list[LayerPlan | None]) -> LinearizedForCausalLM:
    """The student before any training: the teacher's weights, and mixers that start from its attention where they can.

    Args:
        teacher: a decoder of the Llama kind.
        plans: one a layer, None where softmax stays.

    Raises:
        UserError: a layer cannot be converted, or mixer and plan do not fit it.
    """
    check_teacher(teacher)
    student = LinearizedForCausalLM(linearized_config(teacher.config, plans))
    nn.Module.to(student, teacher.device)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    student.lm.load_state_dict(teacher.state_dict(), strict=False)
    for index, layer in student.converted().items():
        layer.take_over(teacher.model.layers[index].self_attn)
    return student


def check_teacher(teacher: Any) -> None:
    """Refuses a model that is no decoder of the Llama kind, or has a layer that cannot be converted.

    Raises:
        UserError: such a model, with the layer.
    """
    if not hasattr(getattr(teacher, "model", None), "layers") or not hasattr(teacher, "lm_head"):
        raise UserError(
            f"{type(teacher).__name__} has no model.layers and lm_head; supported are decoders built like Llama (Llama, SmolLM2, "
            "Qwen2, Qwen3, Mistral, Gemma)."
        )
    for index, block in enumerate(teacher.model.layers):
        if not hasattr(block, "self_attn"):
            raise UserError(f"Layer {index} ({type(block).__name__}) has no self_attn; supported are layers built like Llama's.")
        teacher_shape(block, index)


def teacher_shape(block: Any, index: int) -> AttentionShape:
    """Sizes of the attention of a decoder layer.

    Raises:
        UserError: it cannot be converted.
    """
    attention = block.self_attn
    return attention_shape(attention, f"Layer {index} ({type(attention).__name__})")


AutoConfig.register(MODEL_TYPE, LinearizedConfig, exist_ok=True)
AutoModelForCausalLM.register(LinearizedConfig, LinearizedForCausalLM, exist_ok=True)
