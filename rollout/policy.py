"""A policy: weights, tokenizer and adapters, with the log-probabilities that training and scoring need."""

import contextlib
import functools
import re
from dataclasses import replace

import torch
import torch.nn.functional as F

from ..kernels import QuantizedWeight, dequantize_4bit, fused_linear_logprob
from .attention import TreeAttention
from .checkpoint import open_checkpoint, resolve_checkpoint
from .graphs import GraphPool
from .host_memory import in_host_memory, laid_out_again
from .layer_steps import LayerSteps, padded_tokens
from .linear import LINEARS, in_kernel_order, quantized, stack_weights
from .lora import DEFAULT_LORA, check_targets, read_adapter, write_adapter
from .model import Transformer
from .packing import pack_tree

HEAD_WORKSPACE = 48 * 2**20  # bytes of the head's temporary memory beside what it keeps for backward


def without_autocast(method):
    """``method`` of a policy, or of what has one, computing in the policy's own dtype whatever surrounds the call."""

    @functools.wraps(method)
    def call(self, *args, **options):
        device = getattr(self, "policy", self).device
        with torch.autocast(device.type, enabled=False):
            return method(self, *args, **options)

    return call


class Policy:
    """A frozen base with live adapters, which the sampler and the trainer read from the same tensors."""

    def __init__(self, model, tokenizer, *, name="", lora=None):
        self.model = model
        self.tokenizer = tokenizer
        self.config = model.config
        self.name = name
        self.lora = lora
        self.graph_pool = GraphPool()
        # On a GPU launches are what a pass would wait for; ``LayerSteps(self, graphs=False)`` goes without graphs.
        self.steps = LayerSteps(self) if self.device.type == "cuda" else None
        # Called with a layer's trained adapters and their (values,) float32 gradients, one after the other; then
        # autograd gets none, which would have to be of the adapters' dtype.
        self.take_gradients = None

    @classmethod
    def load(cls, name_or_path=None, *, quantize=None, lora=DEFAULT_LORA, device=None, dtype=None, seed=0):
        """Load a checkpoint (default: the packaged SmolLM2-135M-Instruct) and attach fresh adapters.

        quantize: "nf4", "int4" or None (dense) for the linears of the blocks; lora: ``LoraConfig`` or None;
        device: CUDA where there is one, else the CPU; dtype: bfloat16 on CUDA, float32 on the CPU; seed: of lora_a.
        """
        if quantize not in (None, "nf4", "int4"):
            raise ValueError(f'quantize must be "nf4", "int4" or None, got {quantize!r}')
        device = choose_device(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        checkpoint = open_checkpoint(resolve_checkpoint(name_or_path))
        far = stays_in_host_memory(checkpoint.config, quantize, device)

        def place(name, tensor):
            tensor = _place(name, tensor, quantize if is_linear(name) else None, device, dtype)
            return in_host_memory(tensor) if name == far else tensor

        tensors = checkpoint.tensors(keep_4bit=quantize is not None)
        placed = ((name, place(name, tensor)) for name, tensor in tensors)
        weights = dict(stack_weights(placed))
        if quantize is not None and device.type == "cuda":
            weights = laid_out_again(weights, device, but=far)
        policy = cls(Transformer(checkpoint.config, weights), checkpoint.tokenizer, name=str(checkpoint.path))
        if lora is not None:
            policy.add_adapters(lora, seed=seed)
        return policy

    @property
    def device(self):
        return self.model.embedding.device

    @property
    def dtype(self):
        return self.model.embedding.dtype

    def add_adapters(self, lora, *, seed=0):
        """Attach fresh adapters in place of any others; untrained, they leave the base's output as it is."""
        check_targets(lora, self.config.architecture)
        dtype = getattr(torch, lora.dtype)
        if dtype not in (torch.float32, self.dtype):
            raise ValueError(f"LoRA dtype must be float32 or the model's {self.dtype}, got {dtype}")
        generator = torch.Generator().manual_seed(seed)
        for _, linear in self.model.linears():
            linear.add_adapters(lora.targets, lora.r, lora.alpha, generator, dtype)
        self.lora = lora

    def adapters(self):
        """Dict of PEFT parameter names to the live adapter parameters, in the model's order."""
        found = {}
        for name, projection in self.model.projections():
            if projection.lora_a is not None:
                found[f"base_model.model.{name}.lora_A.weight"] = projection.lora_a
                found[f"base_model.model.{name}.lora_B.weight"] = projection.lora_b
        return found

    @contextlib.contextmanager
    def disable_adapters(self):
        """Inside, the policy is its frozen base: the reference policy, without a second set of weights."""
        linears = [linear for _, linear in self.model.linears()]
        before = [linear.adapter_on for linear in linears]
        for linear in linears:
            linear.adapter_on = False
        try:
            yield self
        finally:
            for linear, adapter_on in zip(linears, before, strict=True):
                linear.adapter_on = adapter_on

    @without_autocast
    def score(
        self,
        input_ids,
        completion_mask,
        *,
        cu_seqlens=None,
        temperature=1.0,
        return_entropy=False,
        return_hidden_states=False,
        share_prefix=True,
    ):
        """Log-probabilities of the completion tokens, each given all tokens before it in its sequence.

        Args:
            input_ids: (N,) int64, sequences laid end to end; or (B, T), a sequence a row.
            completion_mask: bool, the shape of input_ids: the tokens to score. A sequence's first token has no
                predecessor and cannot be scored.
            cu_seqlens: (S+1,) sequence borders of a flat input_ids; None: one sequence.
            temperature: logits are divided by it.
            return_entropy: also return the entropy (nats) of each scored token's distribution.
            return_hidden_states: also return the (K, D) hidden states that predict the K scored tokens, in order.
            share_prefix: compute what sequences have in common once.

        Returns:
            Float32 log-probs of input_ids' shape, 0 where not scored, differentiable to the adapters where grad is
            enabled. With return_entropy or return_hidden_states a tuple of these and what was asked for.
        """
        shape = input_ids.shape
        if completion_mask.shape != shape:
            raise ValueError(
                f"completion_mask has shape {tuple(completion_mask.shape)}, input_ids {tuple(shape)}"
            )
        if input_ids.dim() == 2:
            cu_seqlens = torch.arange(shape[0] + 1) * shape[1]
        elif cu_seqlens is None:
            cu_seqlens = torch.tensor([0, shape[0]])
        flat_ids, borders = input_ids.reshape(-1).tolist(), cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != len(flat_ids) or sorted(borders) != borders:
            raise ValueError(f"cu_seqlens must rise from 0 to {len(flat_ids)}, got {borders[:8]}")
        sequences = [flat_ids[a:b] for a, b in zip(borders, borders[1:], strict=False)]
        tree = pack_tree(sequences, share_prefix=share_prefix)
        mask = completion_mask.reshape(-1).cpu()
        scored = torch.zeros(tree.input_ids.numel(), dtype=torch.bool)
        scored[tree.node[mask]] = True
        if bool((scored & (tree.parent < 0)).any()):
            raise ValueError("completion_mask marks the first token of a sequence, which nothing predicts")
        targets, where = scored.nonzero()[:, 0], mask.nonzero()[:, 0]
        row_of_node = torch.zeros_like(tree.parent)
        row_of_node[targets] = torch.arange(len(targets))
        if self.steps is not None:
            tree = tree.padded(padded_tokens(len(tree.input_ids)))
        input_ids, positions, key_end, predictors, target_ids, rows, where = self._on_device(
            tree.input_ids, tree.positions, tree.key_end, tree.parent[targets], tree.input_ids[targets],
            row_of_node[tree.node[mask]], where,
        )  # fmt: skip
        hidden_states = self.model(input_ids, positions, TreeAttention(key_end), self.steps)
        hidden_states = hidden_states[predictors]
        out = fused_linear_logprob(
            hidden_states,
            self.model.head,
            target_ids,
            temperature=temperature,
            return_entropy=return_entropy,
            workspace_bytes=HEAD_WORKSPACE + 16 * len(hidden_states) + 4 * hidden_states.numel(),
        )

        def scatter(values):
            return values.new_zeros(len(mask)).index_copy(0, where, values[rows]).reshape(shape)

        extras = [scatter(out.entropy)] if return_entropy else []
        extras += [hidden_states[rows]] if return_hidden_states else []
        return (scatter(out.logprobs), *extras) if extras else scatter(out.logprobs)

    def _on_device(self, *tensors):
        """1-D int64 ``tensors`` of the CPU on the policy's device, in one copy that waits for nothing."""
        if self.device.type == "cpu":
            return tensors
        # Kernels look at an alignment of 16 bytes.
        even = [F.pad(tensor, (0, len(tensor) % 2)) for tensor in tensors]
        together = torch.cat(even).pin_memory().to(self.device, non_blocking=True)
        parts = together.split([len(tensor) for tensor in even])
        return [part[: len(tensor)] for part, tensor in zip(parts, tensors, strict=True)]

    def save_adapter(self, folder):
        """Write the adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""
        if self.lora is None:
            raise ValueError("this policy has no adapters to save")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.adapters().items()}
        write_adapter(folder, self.lora, tensors, base=self.name, architecture=self.config.architecture)

    def load_adapter(self, folder):
        """Replace the adapters by those of a folder in PEFT's format, made by this project or by PEFT."""
        shapes = {name: projection.shape for name, projection in self.model.projections()}
        lora, tensors = read_adapter(folder, shapes, architecture=self.config.architecture)
        if self.lora is not None:
            lora = replace(lora, dtype=self.lora.dtype)
        self._check_adapter_tensors(tensors, lora, source=str(folder))
        if self.lora is None or (self.lora.r, set(self.lora.targets)) != (lora.r, set(lora.targets)):
            self.add_adapters(lora)
        for _, linear in self.model.linears():  # adapters of the same shape stay where they are
            linear.scaling = lora.alpha / lora.r
        self.lora = lora
        self.load_adapter_tensors(tensors, source=str(folder))

    def load_adapter_tensors(self, tensors, *, source):
        """Copy ``tensors`` (by PEFT's names) into the live adapters; ``source`` names them in errors."""
        self._check_adapter_tensors(tensors, self.lora, source=source)
        for name, parameter in self.adapters().items():
            parameter.data.copy_(tensors[name])

    def _check_adapter_tensors(self, tensors, lora, *, source):
        """ValueError unless ``tensors`` are those of adapters of shape ``lora`` on this model."""
        shapes = {}
        for name, projection in self.model.projections():
            if projection.name in lora.targets:
                n, k = projection.shape
                shapes[f"base_model.model.{name}.lora_A.weight"] = (lora.r, k)
                shapes[f"base_model.model.{name}.lora_B.weight"] = (n, lora.r)
        if set(tensors) != set(shapes):
            odd = sorted(set(tensors) ^ set(shapes))[:3]
            raise ValueError(f"{source}: adapter tensors do not fit this model, first differences: {odd}")
        for name, expected in shapes.items():
            if (got := tuple(tensors[name].shape)) != expected:
                raise ValueError(f"{source}: {name} has shape {got}, expected {expected}")


def choose_device(name=None):
    """The ``torch.device`` called ``name``, default CUDA where there is one; ValueError for one that is not there."""
    name = str(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", name):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for, and torch sees no CUDA GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} was asked for, and torch sees {torch.cuda.device_count()} CUDA GPUs"
        )
    return device


def stays_in_host_memory(config, quantize, device):
    """Name of the tensor that a GPU reads in the CPU's memory, None for none: what is only ever gathered from.

    An embedding that is no head as well, where weights are quantised to save memory.
    """
    wanted = device.type == "cuda" and quantize is not None and not config.tie_word_embeddings
    return "model.embed_tokens.weight" if wanted else None


def is_linear(name):
    """Whether the tensor of this Hugging Face name is the weight of a linear that may be quantised or adapted."""
    return name.rsplit(".", 2)[-2] in LINEARS and name.endswith(".weight")


def _place(name, tensor, quantize, device, dtype):
    """A checkpoint's tensor on its device, in 4 bits where asked; a 4-bit tensor of another format is requantised."""
    if isinstance(tensor, QuantizedWeight):
        if quantize == tensor.format:
            return in_kernel_order(tensor.to(device))
        tensor = dequantize_4bit(tensor, torch.float32)
    tensor = tensor.to(device)
    return tensor.to(dtype) if quantize is None else quantized(tensor, quantize, name)
