# SPDX-License-Identifier: Apache-2.0
"""Random models of 1-2 M parameters, of every family that is shown working, built in-process with no download.

Each builder gives `(model, processor)`; `BUILDERS` maps names to builders, `VLM_NAMES` lists those that see images.
Byte-level BPE tokenizers of about 500 tokens; the chat template is ChatML without a newline after an assistant's turn,
so that a completion ends with its end token `<|im_end|>`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|im_end|>"
PAD_ID, END_ID, START_ID = 0, 1, 2
CORPUS = (
    'what colour is the square? red green blue up down left right hit stand {"thoughts": "", "action": "+"} user '
    "assistant system"
)
TEXT = {
    "hidden_size": 160,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD_ID,
    "eos_token_id": END_ID,
    "bos_token_id": START_ID,
}
VISION = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}


def make_tokenizer(*special: str, **named: str) -> tf.PreTrainedTokenizerFast:
    """A tokenizer with `special` tokens after pad (0), end (1) and start (2); `named` become its attributes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", END, "<|im_start|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=END,
        bos_token="<|im_start|>",
        extra_special_tokens=named or None,
    )


def chat_template(image: str = "") -> str:
    """ChatML; an image part becomes `image`."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for c in m.content %}{{ '" + image + "' if c.type == 'image' else c.text }}{% endfor %}{% endif %}"
        "<|im_end|>{{ '' if m.role == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def idefics3() -> tuple[Any, Any]:
    """4 image tokens."""
    return _idefics(
        tf.Idefics3ImageProcessorPil, tf.Idefics3Processor, tf.Idefics3Config, tf.Idefics3ForConditionalGeneration
    )


def smolvlm() -> tuple[Any, Any]:
    """4 image tokens. SmolVLM2 is of this family."""
    processor = image_only(tf.SmolVLMProcessor)
    return _idefics(tf.SmolVLMImageProcessorPil, processor, tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration)


def _idefics(image_processor: Any, processor_class: Any, config_class: Any, model_class: Any) -> tuple[Any, Any]:
    tokenizer = make_tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    size = {"longest_edge": 64}
    images = image_processor(size=size, max_image_size=size, do_image_splitting=False)
    processor = processor_class(images, tokenizer, image_seq_len=4, chat_template=chat_template("<image>"))
    config = config_class(
        vision_config=VISION,
        text_config=dict(model_type="llama", vocab_size=len(tokenizer), **TEXT),
        scale_factor=2,
        image_token_id=processor.image_token_id,
        pad_token_id=PAD_ID,
    )
    return model_class(config), processor


def idefics2() -> tuple[Any, Any]:
    """4 image tokens, by a perceiver."""
    tokenizer = make_tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>")
    images = tf.Idefics2ImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 64}, do_image_splitting=False)
    processor = tf.Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=chat_template("<image>"))
    perceiver = {
        "hidden_size": TEXT["hidden_size"],
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 4,
        "resampler_head_dim": 24,
        "num_key_value_heads": 2,
    }
    config = tf.Idefics2Config(
        vision_config=VISION,
        perceiver_config=perceiver,
        text_config=dict(model_type="mistral", vocab_size=len(tokenizer), **TEXT),
        image_token_id=processor.image_token_id,
    )
    return tf.Idefics2ForConditionalGeneration(config), processor


def llava() -> tuple[Any, Any]:
    """SigLIP tower, 16 image tokens."""
    tokenizer = make_tokenizer("<image>")
    processor = tf.LlavaProcessor(
        tf.SiglipImageProcessorPil(size={"height": 64, "width": 64}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=chat_template("<image>"),
    )
    config = tf.LlavaConfig(
        vision_config=dict(model_type="siglip_vision_model", vision_use_head=False, **VISION),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=16,
        image_token_index=processor.image_token_id,
        text_config=dict(model_type="llama", vocab_size=len(tokenizer), **TEXT),
    )
    return tf.LlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[Any, Any]:
    """SigLIP tower, 32 image tokens and one for each newline of the picture's rows: the whole and one tile."""
    tokenizer = make_tokenizer("<image>")
    images = tf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_grid_pinpoints=[[64, 64]]
    )
    processor = tf.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=chat_template("<image>"),
    )
    config = tf.LlavaNextConfig(
        vision_config=dict(model_type="siglip_vision_model", vision_use_head=False, **VISION),
        text_config=dict(model_type="llama", vocab_size=len(tokenizer), **TEXT),
        image_token_index=processor.image_token_id,
        image_seq_length=16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[64, 64]],
    )
    return tf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    """SigLIP tower, 32 image tokens and one for the newline of the picture's rows: the whole and one tile."""
    tokenizer = make_tokenizer("<image>", "<video>")
    images = tf.LlavaOnevisionImageProcessorPil(size={"height": 64, "width": 64}, image_grid_pinpoints=[[64, 64]])
    processor = image_only(tf.LlavaOnevisionProcessor)(
        images,
        tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chat_template("<image>"),
    )
    config = tf.LlavaOnevisionConfig(
        vision_config=dict(model_type="siglip_vision_model", vision_use_head=False, **VISION),
        text_config=dict(model_type="qwen2", vocab_size=len(tokenizer), **TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[64, 64]],
    )
    return tf.LlavaOnevisionForConditionalGeneration(config), processor


def pixtral() -> tuple[Any, Any]:
    """20 image tokens, 4 of them for the ends of rows."""
    processor, config = _pixtral(merge=1)
    config = tf.LlavaConfig(vision_feature_layer=-1, vision_feature_select_strategy="full", **config)
    return tf.LlavaForConditionalGeneration(config), processor


def mistral3() -> tuple[Any, Any]:
    """6 image tokens, 2 of them for the ends of rows."""
    processor, config = _pixtral(merge=2)
    config = tf.Mistral3Config(spatial_merge_size=2, tie_word_embeddings=False, **config)
    return tf.Mistral3ForConditionalGeneration(config), processor


def _pixtral(merge: int) -> tuple[Any, dict[str, Any]]:
    """Processor, and the model's configuration as far as the two share it."""
    tokenizer = make_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    images = tf.PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 16, "width": 16})
    # All that its module wants of torchvision is a function which PIL's module has as well.
    package = "transformers.models.pixtral"
    pil = importlib.import_module(f"{package}.image_processing_pil_pixtral")
    with mock.patch.dict(sys.modules, {f"{package}.image_processing_pixtral": pil}):
        processor_class = importlib.import_module(f"{package}.processing_pixtral").PixtralProcessor
    processor = processor_class(
        images, tokenizer, patch_size=16, spatial_merge_size=merge, chat_template=chat_template("[IMG]")
    )
    config = {
        "vision_config": {"model_type": "pixtral", **VISION},
        "text_config": {"model_type": "mistral", "vocab_size": len(tokenizer), "head_dim": 40, **TEXT},
        "image_token_index": processor.image_token_id,
    }
    return processor, config


def internvl() -> tuple[Any, Any]:
    """4 image tokens."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = make_tokenizer(*named.values(), **named)
    images = tf.GotOcr2ImageProcessorPil(size={"height": 64, "width": 64}, max_patches=1)
    template = chat_template("<IMG_CONTEXT>")
    processor = image_only(tf.InternVLProcessor)(images, tokenizer, image_seq_length=4, chat_template=template)
    config = tf.InternVLConfig(
        vision_config={**VISION, "image_size": [64, 64], "patch_size": [16, 16]},
        text_config=dict(model_type="qwen2", vocab_size=len(tokenizer), **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return tf.InternVLForConditionalGeneration(config), processor


def image_only(processor_class: Any) -> Any:
    """The processor class without its video part, which needs torchvision, and without an audio part."""
    parameters = inspect.signature(processor_class.__init__).parameters
    others = {name: None for name in ("video_processor", "feature_extractor") if name in parameters}

    class Present(tf.ProcessorMixin):
        def __init__(self, *parts, **kwargs):
            parts = [part for part in parts if part is not None]
            super().__init__(*parts, **{name: part for name, part in kwargs.items() if part is not None})

    class ImageOnly(processor_class, Present):
        apply_chat_template = tf.ProcessorMixin.apply_chat_template

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            parts = {"image_processor": image_processor, "tokenizer": tokenizer, **others}
            super().__init__(**parts, chat_template=chat_template, **kwargs)

    ImageOnly.__name__ = ImageOnly.__qualname__ = f"ImageOnly{processor_class.__name__}"
    return ImageOnly


def _qwen_tokens() -> tuple[Any, dict[str, int]]:
    tokenizer = make_tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return tokenizer, {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def qwen2_vl() -> tuple[Any, Any]:
    """Between 4 and 16 image tokens."""
    tokenizer, ids = _qwen_tokens()
    images = tf.Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    )
    processor = image_only(tf.Qwen2VLProcessor)(images, tokenizer, chat_template=chat_template(QWEN_IMAGE))
    vision = {
        "depth": 2,
        "embed_dim": 96,
        "mlp_ratio": 2,
        "num_heads": 4,
        "patch_size": 14,
        "hidden_size": TEXT["hidden_size"],
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 8, 8]}
    text = dict(vocab_size=len(tokenizer), rope_parameters=rope, **TEXT)
    config = tf.Qwen2VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **ids)
    return tf.Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl() -> tuple[Any, Any]:
    """Between 4 and 16 image tokens, window attention in the first of two vision layers."""
    tokenizer, ids = _qwen_tokens()
    images = tf.Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    )
    processor = image_only(tf.Qwen2_5_VLProcessor)(images, tokenizer, chat_template=chat_template(QWEN_IMAGE))
    vision = {
        "depth": 2,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 4,
        "patch_size": 14,
        "out_hidden_size": TEXT["hidden_size"],
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 8, 8]}
    text = dict(vocab_size=len(tokenizer), rope_parameters=rope, **TEXT)
    config = tf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **ids)
    return tf.Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[Any, Any]:
    """Between 4 and 12 image tokens, one deep-stack layer."""
    return _qwen3(
        tf.Qwen3VLConfig, tf.Qwen3VLForConditionalGeneration, vision={"deepstack_visual_indexes": [0]}, text={}
    )


def qwen3_5() -> tuple[Any, Any]:
    """Between 4 and 12 image tokens, one layer of linear and one of full attention."""
    linear = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    return _qwen3(tf.Qwen3_5Config, tf.Qwen3_5ForConditionalGeneration, vision={}, text=linear)


def _qwen3(config_class: Any, model_class: Any, vision: dict[str, Any], text: dict[str, Any]) -> tuple[Any, Any]:
    tokenizer, ids = _qwen_tokens()
    images = tf.Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64 * 64, "longest_edge": 112 * 112}
    )
    processor = image_only(tf.Qwen3VLProcessor)(images, tokenizer, chat_template=chat_template(QWEN_IMAGE))
    vision = {
        "depth": 2,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 4,
        "patch_size": 16,
        "out_hidden_size": TEXT["hidden_size"],
        "num_position_embeddings": 64,
        **vision,
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 6, 6], "mrope_interleaved": True}
    text = dict(vocab_size=len(tokenizer), head_dim=40, rope_parameters=rope, **text, **TEXT)
    config = config_class(vision_config=vision, text_config=text, tie_word_embeddings=False, **ids)
    return model_class(config), processor


def glm4v() -> tuple[Any, Any]:
    """Between 4 and 32 image tokens."""
    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    ends = {
        "image_start_token": "<|begin_of_image|>",
        "image_end_token": "<|end_of_image|>",
        "video_start_token": "<|begin_of_video|>",
        "video_end_token": "<|end_of_video|>",
    }
    tokenizer = make_tokenizer(*named.values(), *ends.values(), **named)
    images = tf.Glm4vImageProcessorPil(
        patch_size=14, merge_size=2, size={"shortest_edge": 56 * 56, "longest_edge": 2 * 112 * 112}
    )
    template = chat_template("<|begin_of_image|><|image|><|end_of_image|>")
    processor = image_only(tf.Glm4vProcessor)(images, tokenizer, chat_template=template)
    vision = {
        "depth": 2,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 4,
        "patch_size": 14,
        "image_size": 112,
        "out_hidden_size": TEXT["hidden_size"],
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 8, 8]}
    config = tf.Glm4vConfig(
        vision_config=vision,
        text_config=dict(vocab_size=len(tokenizer), rope_parameters=rope, **TEXT),
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in {**named, **ends}.items()},
    )
    return tf.Glm4vForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    """4 image tokens, one sliding-window and one full layer."""
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = make_tokenizer(*named.values(), **named)
    processor = tf.Gemma3Processor(
        tf.Gemma3ImageProcessorPil(size={"height": 64, "width": 64}),
        tokenizer,
        image_seq_length=4,
        chat_template=chat_template("<start_of_image>"),
    )
    config = tf.Gemma3Config(
        vision_config=dict(model_type="siglip_vision_model", vision_use_head=False, **VISION),
        text_config=dict(
            vocab_size=len(tokenizer),
            head_dim=40,
            query_pre_attn_scalar=40,
            sliding_window=64,
            layer_types=["sliding_attention", "full_attention"],
            **TEXT,
        ),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    model = tf.Gemma3ForConditionalGeneration(config)
    # Zero when fresh, which would hide the pictures.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    return model, processor


def gemma4() -> tuple[Any, Any]:
    """64 image tokens, one sliding-window and one full layer, embeddings for each layer."""
    named = {
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "image_token": "<|image|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
        "audio_token": "<|audio|>",
    }
    tokenizer = make_tokenizer(*named.values(), "<|video|>", **named)
    # As small as the class allows.
    images = tf.Gemma4ImageProcessorPil(max_soft_tokens=70, patch_size=16, pooling_kernel_size=2)
    processor_class = image_only(tf.Gemma4Processor)
    processor = processor_class(images, tokenizer, chat_template=chat_template("<|image|>"))
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 24,
        "patch_size": 16,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }
    text = dict(
        vocab_size=len(tokenizer),
        vocab_size_per_layer_input=len(tokenizer),
        hidden_size_per_layer_input=16,
        head_dim=40,
        global_head_dim=40,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        **TEXT,
    )
    config = tf.Gemma4Config(
        vision_config=vision,
        text_config=text,
        audio_config=None,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        **ids,
    )
    return tf.Gemma4ForConditionalGeneration(config), processor


def paligemma() -> tuple[Any, Any]:
    """16 image tokens; a prompt is read in both directions."""
    tokenizer = make_tokenizer("<image>", image_token="<image>")
    processor = tf.PaliGemmaProcessor(
        tf.SiglipImageProcessorPil(size={"height": 64, "width": 64}, image_seq_length=16),
        tokenizer,
        chat_template=chat_template("<image>"),
    )
    config = tf.PaliGemmaConfig(
        vision_config=dict(
            model_type="siglip_vision_model", vision_use_head=False, projection_dim=TEXT["hidden_size"], **VISION
        ),
        text_config=dict(model_type="gemma", vocab_size=len(tokenizer), head_dim=40, **TEXT),
        image_token_index=processor.image_token_id,
        projection_dim=TEXT["hidden_size"],
    )
    return tf.PaliGemmaForConditionalGeneration(config), processor


def _text_only(model_class: Any, config_class: Any, **kwargs: Any) -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template()
    return model_class(config_class(vocab_size=len(tokenizer), **TEXT, **kwargs)), tokenizer


def llama() -> tuple[Any, Any]:
    """Text only; the processor is a tokenizer."""
    return _text_only(tf.LlamaForCausalLM, tf.LlamaConfig)


def qwen3() -> tuple[Any, Any]:
    """Text only, with tied embeddings; the processor is a tokenizer."""
    return _text_only(tf.Qwen3ForCausalLM, tf.Qwen3Config, head_dim=40, tie_word_embeddings=True)


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "idefics2": idefics2,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "internvl": internvl,
    "glm4v": glm4v,
    "gemma3": gemma3,
    "gemma4": gemma4,
    "paligemma": paligemma,
    "pixtral": pixtral,
    "mistral3": mistral3,
    "llama": llama,
    "qwen3": qwen3,
}
TEXT_NAMES = ("llama", "qwen3")
VLM_NAMES = tuple(name for name in BUILDERS if name not in TEXT_NAMES)


def build(name: str, seed: int = 0) -> tuple[Any, Any]:
    """`BUILDERS[name]()` with weights that depend on `seed` only; end and pad tokens set for generation."""
    torch.manual_seed(seed)
    model, processor = BUILDERS[name]()
    model.generation_config.update(pad_token_id=PAD_ID, eos_token_id=END_ID, bos_token_id=START_ID)
    return model, processor
