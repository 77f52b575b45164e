"""Write the four fp32 graphs: vision encoder, Q-Former with projection, token embedding, decoder with KV cache.

No released Optimum exports InstructBLIP. ``torch.onnx`` traces the first three graphs. ONNX Runtime GenAI's model
builder writes the decoder with GroupQueryAttention, which is fastest in ONNX Runtime.
"""

import tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime_genai.models.builder import create_model, parse_extra_options
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbedge.backends.ort import LOGITS_START
from export.encoder_decoder import export_encoder_decoder
from export.tracing import DECODER, EMBED, QFORMER, VISION, ExportError, save_graph, trace
from training.base import ModelAndTokenizers


class VisionGraph(nn.Module):
    """Pixels [B, 3, S, S] → features [B, P, H]."""

    def __init__(self, parts: ModelAndTokenizers):
        super().__init__()
        self.vision_model = parts.model.vision_model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Run the vision encoder."""
        return self.vision_model(pixel_values=pixel_values).last_hidden_state


class QFormerGraph(nn.Module):
    """Features [1, P, H] and instruction tokens [1, I] → image embeddings [1, Q, D], attention, finding logits [1, T].

    The attention is cross-attention, the mean over heads and layers: [1, T, P], one row for each finding of the head.
    A model without a finding head returns the mean over queries, [1, 1, P], and no logits.
    """

    def __init__(self, parts: ModelAndTokenizers):
        super().__init__()
        self.qformer = parts.model.qformer
        self.projection = parts.model.language_projection
        self.query_tokens = parts.model.query_tokens
        self.finding_head = parts.finding_head
        self.qformer.config._attn_implementation = "eager"  # the only one that returns its weights

    def forward(self, image_features: Tensor, qformer_input_ids: Tensor) -> tuple[Tensor, ...]:
        """Query the features under the instruction, and project."""
        weights: list[Tensor] = []  # of each layer with cross-attention, [1, heads, Q, P]
        crossed = [layer.crossattention.attention for layer in self.qformer.encoder.layer if layer.has_cross_attention]
        hooks = [one.register_forward_hook(lambda module, inputs, out: weights.append(out[1])) for one in crossed]
        count = self.query_tokens.shape[1]
        queries = self.query_tokens.expand(len(image_features), -1, -1)
        mask = torch.ones(
            qformer_input_ids.shape[0], count + qformer_input_ids.shape[1], dtype=torch.long, device=queries.device
        )
        output = self.qformer(
            input_ids=qformer_input_ids, attention_mask=mask, query_embeds=queries, encoder_hidden_states=image_features
        ).last_hidden_state[:, :count]
        for hook in hooks:
            hook.remove()
        attention = torch.stack(weights).mean((0, 2))
        if self.finding_head is None:
            return self.projection(output), attention.mean(1, keepdim=True)
        return self.projection(output), attention[:, list(self.finding_head.queries)], self.finding_head.logits(output)


class EmbedGraph(nn.Module):
    """Token ids [1, L] → embeddings [1, L, D]."""

    def __init__(self, parts: ModelAndTokenizers):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(parts.model.get_input_embeddings().weight.detach().float())

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look the tokens up."""
        return self.embedding(input_ids)


@torch.inference_mode()
def export_graphs(parts: ModelAndTokenizers, folder: Path) -> dict[str, Path]:
    """Write the graphs of a merged fp32 model into ``folder``, five if the language model has an encoder, else four;
    returns the path of each.

    Raises:
        ExportError: the language model is neither Flan-T5 nor supported by the decoder's builder.
    """
    paths = export_image_graphs(parts, folder)
    if not parts.model.config.use_decoder_only_language_model:
        return paths | export_encoder_decoder(parts.model.language_model, folder)
    paths[DECODER] = folder / f"{DECODER}.onnx"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        save_graph(build_decoder(parts.model.language_model, parts.tokenizer, Path(scratch)), paths[DECODER])
    return paths


@torch.inference_mode()
def export_image_graphs(parts: ModelAndTokenizers, folder: Path) -> dict[str, Path]:
    """Write only vision encoder, Q-Former and token embedding; returns the path of each."""
    parts.model.eval()
    vision = parts.model.config.vision_config
    paths = {kind: folder / f"{kind}.onnx" for kind in (VISION, QFORMER, EMBED)}
    pixels = torch.zeros(1, 3, vision.image_size, vision.image_size)
    features = parts.model.vision_model(pixel_values=pixels).last_hidden_state
    instruction = parts.qformer_tokenizer("Describe the chest radiograph.", return_tensors="pt").input_ids
    length = torch.export.Dim("length", min=2, max=512)
    outputs = ["image_embeds", "attention", *(["finding_logits"] if parts.finding_head else [])]
    trace(VisionGraph(parts), (pixels,), paths[VISION], ["pixel_values"], ["image_features"], None)
    trace(
        QFormerGraph(parts),
        (features, instruction),
        paths[QFORMER],
        ["image_features", "qformer_input_ids"],
        outputs,
        {"image_features": None, "qformer_input_ids": {1: length}},
    )
    trace(
        EmbedGraph(parts),
        (instruction,),
        paths[EMBED],
        ["input_ids"],
        ["inputs_embeds"],
        {"input_ids": {1: torch.export.Dim("tokens", min=1, max=8192)}},
    )
    return paths


def build_decoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, scratch: Path) -> onnx.ModelProto:
    """The graph of a language model in fp32, with its weights in memory: ``inputs_embeds``, KV cache, and logits of
    the last positions only; ``scratch`` is an empty folder.

    Raises:
        ExportError: the builder does not support the architecture; the message has its reason.
    """
    checkpoint, built = scratch / "checkpoint", scratch / "built"
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config  # of the base weights (GGUF); these are in fp32
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    where = (None, str(checkpoint), str(built), "fp32", "cpu", str(scratch / "cache"))
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # it tells of every layer
            options = parse_extra_options(*where, ["exclude_embeds=true", "prune_lm_head=true"])
            create_model(*where, **options)
    except Exception as error:
        raise ExportError(f"the decoder's builder failed on {type(model).__name__}: {error}") from error
    graph = onnx.load(str(built / "model.onnx"))
    choose_logits(graph)
    return graph


def choose_logits(graph: onnx.ModelProto) -> None:
    """Let the head compute the positions from ``logits_start`` on, a new input int64 [1]; -1 means only the last one.

    Speculative decoding needs the logits of every guess, but a prefill only those of its last position: over the whole
    prompt, the head would take longer than some layers. The input is used without any computation, so it can stay in
    CPU memory: CUDA graphs allow no copy from the GPU.

    Raises:
        ExportError: the graph is not what the builder writes with ``prune_lm_head``.
    """
    nodes = {node.name: node for node in graph.graph.node}
    gather, unsqueeze = nodes.get("/lm_head/prune/Gather"), nodes.get("/lm_head/prune/Unsqueeze")
    if gather is None or unsqueeze is None:
        raise ExportError("the decoder's builder wrote another graph than expected: use the pinned onnxruntime-genai")
    end, axis = (f"/lm_head/last/{name}" for name in ("end", "axis"))
    inputs = [gather.input[0], LOGITS_START, end, axis]
    last = helper.make_node("Slice", inputs, list(unsqueeze.output), name="/lm_head/last")
    at = list(graph.graph.node).index(gather)
    for node in (gather, unsqueeze):
        graph.graph.node.remove(node)
    graph.graph.node.insert(at, last)
    for name, value in ((end, np.iinfo(np.int64).max), (axis, 1)):
        graph.graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    graph.graph.input.append(helper.make_tensor_value_info(LOGITS_START, TensorProto.INT64, [1]))
    logits = next(output for output in graph.graph.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[1].ClearField("dim_value")
    logits.type.tensor_type.shape.dim[1].dim_param = "num_logits"
    for info in [v for v in graph.graph.value_info if v.name in {*gather.output, *unsqueeze.output}]:
        graph.graph.value_info.remove(info)
