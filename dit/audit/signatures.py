"""Networks of diffusers whose arguments follow no convention: a table of small configurations and of what each is called with.

Read off the signatures and the documentation of `forward` in diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dit.audit.specs import Count, Full, Grid, Joined, Normal, Steps


@dataclass(frozen=True)
class Signature:
    """Constructor arguments that differ from the defaults, and the arguments of `forward`."""

    config: Mapping[str, Any]
    inputs: Mapping[str, Any]


SIGNATURES: dict[str, Signature] = {
    "AceStepTransformer1DModel": Signature(
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "encoder_hidden_size": 32,
        },
        {
            "hidden_states": Normal((3, 8, 8)),
            "timestep": Steps(),
            "timestep_r": Steps(0.5),
            "encoder_hidden_states": Normal((3, 7, 32)),
            "context_latents": Normal((3, 8, 16)),
        },
    ),
    "BriaFibo2Transformer2DModel": Signature(
        {
            "in_channels": 4,
            "dim": 64,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 16,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 8,
            "max_num_gist_tokens": 16,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 64,
            "axes_dims": (8, 12, 12),
            "axes_lens": (64, 32, 32),
        },
        {"hidden_states": Normal((3, 4, 8, 8)), "timestep": Steps(), "encoder_hidden_states": Normal((3, 2, 8, 16))},
    ),
    "BriaFiboTransformer2DModel": Signature(
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "text_encoder_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        {
            "hidden_states": Normal((3, 16, 16)),
            "encoder_hidden_states": Normal((3, 7, 32)),
            "text_encoder_layers": [Normal((3, 7, 32))] * 4,
            "timestep": Steps(1000),
            "img_ids": Grid(0, 4),
            "txt_ids": Full((7, 3), 0),
        },
    ),
    "CosmosTransformer3DModel": Signature(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 8,
            "max_size": (4, 32, 32),
            "concat_padding_mask": False,
        },
        {
            "hidden_states": Normal((3, 4, 1, 8, 8)),
            "timestep": Steps(1000),
            "encoder_hidden_states": Normal((3, 7, 16)),
            "fps": 16,
        },
    ),
    "HiDreamImageTransformer2DModel": Signature(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": (32, 16),
            "text_emb_dim": 64,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (32, 32),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        {
            "hidden_states": Normal((3, 4, 8, 8)),
            "timesteps": Steps(1000),
            "encoder_hidden_states_t5": Normal((3, 7, 32)),
            "encoder_hidden_states_llama3": Normal((2, 3, 7, 16)),
            "pooled_embeds": Normal((3, 64)),
        },
    ),
    "Ideogram4Transformer2DModel": Signature(
        {
            "in_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "adaln_dim": 32,
            "llm_features_dim": 24,
            "mrope_section": (4, 2, 2),
        },
        {
            "hidden_states": Normal((3, 20, 8)),
            "timestep": Steps(),
            "encoder_hidden_states": Normal((3, 20, 24)),
            "position_ids": Grid(4, 4, by_sample=True),
            "segment_ids": Full((3, 20), 1),
            "indicator": Joined((Full((3, 4), 3), Full((3, 16), 2))),
        },
    ),
    "JoyImageEditPlusTransformer3DModel": Signature(
        {
            "in_channels": 4,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 2,
            "rope_dim_list": [8, 12, 12],
        },
        {
            "hidden_states": Normal((3, 16, 4, 1, 2, 2)),
            "timestep": Steps(1000),
            "encoder_hidden_states": Normal((3, 7, 16)),
            "shape_list": [[(1, 4, 4)]] * 3,
        },
    ),
    "Kandinsky6Transformer3DModel": Signature(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 12,
            "time_dim": 32,
            "model_dim": 32,
            "ff_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "in_audio_dim": 8,
            "out_audio_dim": 8,
        },
        {
            "hidden_states": Normal((3, 2, 8, 8, 9)),
            "encoder_hidden_states": Normal((3, 7, 16)),
            "pooled_projections": Normal((3, 12)),
            "timestep": Steps(1000),
            "audio_hidden_states": Normal((3, 6, 8)),
        },
    ),
    "Krea2Transformer2DModel": Signature(
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "timestep_embed_dim": 32,
            "text_hidden_dim": 32,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 48,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        {
            "hidden_states": Normal((3, 16, 16)),
            "encoder_hidden_states": Normal((3, 7, 3, 32)),
            "timestep": Steps(),
            "position_ids": Grid(7, 4),
        },
    ),
    "LTX2VideoTransformer3DModel": Signature(
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 24,
        },
        {
            "hidden_states": Normal((3, 32, 8)),
            "audio_hidden_states": Normal((3, 5, 4)),
            "encoder_hidden_states": Normal((3, 7, 24)),
            "audio_encoder_hidden_states": Normal((3, 7, 24)),
            "timestep": Steps(1000),
            "num_frames": 2,
            "height": 4,
            "width": 4,
            "audio_num_frames": 5,
        },
    ),
    "MiniMaxMusic3Transformer1DModel": Signature(
        {
            "in_channels": 8,
            "condition_dim": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "ff_inner_dim": 64,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        {"hidden_states": Normal((3, 8, 12)), "timestep": Steps(), "encoder_hidden_states": Normal((3, 12, 16))},
    ),
    "OmniGenTransformer2DModel": Signature(
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 64,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 100,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
            "pos_embed_max_size": 8,
            "time_step_dim": 32,
        },
        {
            "hidden_states": Normal((3, 4, 8, 8)),
            "timestep": Steps(),
            "input_ids": Count((3, 7)),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": Full((3, 24, 24), 1),
            "position_ids": Count((1, 24)),
        },
    ),
    "QwenImage21Transformer2DModel": Signature(
        {
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        {
            "hidden_states": Normal((3, 16, 16)),
            "encoder_hidden_states": Normal((3, 7, 24)),
            "timestep": Steps(),
            "img_shapes": [[(1, 4, 4)]] * 3,
            "img_mask": Joined((Full((3, 7), False), Full((3, 4), True))),
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Signature(
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 24,
        },
        {
            "hidden_states": Normal((3, 16, 8)),
            "encoder_hidden_states": Normal((3, 7, 24)),
            "timestep": Steps(1000),
            "video_rotary_emb": [Normal((1, 16, 32)), Normal((1, 16, 32))],
        },
    ),
    "TransformerTemporalModel": Signature(
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 32, "num_layers": 2},
        {"hidden_states": Normal((6, 32, 4, 4)), "num_frames": 2},
    ),
}
"""By class. Text comes before the image where both are in one sequence, and the sample has three samples."""
