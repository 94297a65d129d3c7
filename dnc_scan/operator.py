"""The fused DNC recurrence: the function of dnc_gpt2.dnc_loop, at the speed of its controller.

    reads, write_weights, read_weights, state = dnc_scan(interface, state, options)

Read downward: two custom operators, which make either back end differentiable; why neither may be
able to run; the function.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from dnc_scan import cpu, cuda
from dnc_scan.layout import CHECKPOINT_EVERY, PARTS, RESULTS, STATE, TRACES, empty_results

BACKENDS = {
    "numba": (cpu.numba_forward, cpu.numba_backward),
    "triton": (cuda.triton_forward, cuda.triton_backward),
}


# ══ The operators ════════════════════════════════════════════════════════════════════════════════


@torch.library.custom_op("dnc_gpt2::scan", mutates_args=(), schema=(
    "(Tensor[] parts, Tensor[] state, bool wipe, float decay, bool record, int every, str backend) "
    "-> Tensor[]"))
def scan_op(parts, state, wipe, decay, record, every, backend):
    """Run a back end over PARTS and STATE -> RESULTS and TAPE."""
    forward, _ = BACKENDS[backend]
    return list(forward(parts, state, wipe, decay, every, record))


@scan_op.register_fake
def _(parts, state, wipe, decay, record, every, backend):
    return empty_results(parts, state, every, record)


@torch.library.custom_op("dnc_gpt2::scan_backward", mutates_args=(), schema=(
    "(Tensor[] grads, Tensor[] parts, Tensor[] state, Tensor[] traces, bool wipe, float decay, "
    "int every, str backend) -> Tensor[]"))
def scan_backward_op(grads, parts, state, traces, wipe, decay, every, backend):
    """Turn the gradients of RESULTS into those of PARTS and STATE."""
    _, backward = BACKENDS[backend]
    return list(backward(grads, parts, state, traces, wipe, decay, every))


@scan_backward_op.register_fake
def _(grads, parts, state, traces, wipe, decay, every, backend):
    return [torch.empty_like(tensor) for tensor in (*parts, *state)]


def save_for_backward(ctx, inputs, output) -> None:
    """Keep what the backward reads."""
    parts, state, ctx.wipe, ctx.decay, _, ctx.every, ctx.backend = inputs
    results = output[:len(RESULTS)]
    tape = output[len(RESULTS):]
    ctx.result_shapes = [tensor.shape for tensor in results]

    ctx.set_materialize_grads(False)  # or the whole tape would get gradients of zero
    ctx.mark_non_differentiable(*tape)
    # The memory that the state began with is the first checkpoint of the tape.
    _, write_weights, read_weights, *_ = results
    ctx.save_for_backward(*parts, *state[1:], write_weights, read_weights, *tape)


def scan_backward(ctx, grads):
    """Call the backward operator with a gradient for every result, zeros where there is none."""
    saved = list(ctx.saved_tensors)
    parts = saved[:len(PARTS)]
    traces = saved[-len(TRACES):]
    memories = traces[TRACES.index("memories")]  # (B, checkpoints, N, W)
    memory = memories[:, 0].contiguous()
    state = [memory, *saved[len(PARTS):-len(TRACES)]]

    result_grads = []
    for grad, shape in zip(grads, ctx.result_shapes, strict=False):  # not those of the tape
        grad = memory.new_zeros(shape) if grad is None else grad.contiguous()
        result_grads.append(grad)

    input_grads = scan_backward_op(
        result_grads, parts, state, traces, ctx.wipe, ctx.decay, ctx.every, ctx.backend)
    return input_grads[:len(PARTS)], input_grads[len(PARTS):], *[None] * 5


scan_op.register_autograd(scan_backward, setup_context=save_for_backward)


# ══ Where it runs ════════════════════════════════════════════════════════════════════════════════


def backend_for(state, backend: str = "auto") -> str:
    """Choose the back end of a state's device. Raises ValueError for a name that is none."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r}: must be one of auto, {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    return "triton" if state.memory.is_cuda else "numba"


def refusal(state, options, backend: str = "auto") -> str:
    """Say why the fused recurrence cannot run on this state, and what to do; "" where it can."""
    memory = state.memory
    backend = backend_for(state, backend)

    if options.mask_min < 1:
        return f"mask_min {options.mask_min} runs in the eager loop alone; set mask_min=1.0"
    if options.sharpen_links:
        return "sharpen_links runs in the eager loop alone; set sharpen_links=False"
    if backend == "numba" and memory.device.type != "cpu":
        return f"there is no fused recurrence for {memory.device.type}; use cuda or the cpu"

    takes_float64 = not memory.is_cuda
    if memory.dtype != torch.float32 and not (takes_float64 and memory.dtype == torch.float64):
        return f"the state is {memory.dtype}; keep it in float32"

    if backend == "numba":
        return cpu.MISSING
    return cuda.MISSING or cuda_refusal(state, options)


def cuda_refusal(state, options) -> str:
    """Say why the CUDA kernels cannot run at these sizes or on this machine; "" where they can."""
    N, W = state.memory.shape[1:]
    R = state.read_weights.shape[1]
    most_slots = 128 if options.use_links else 256
    most_elements = 16_384 if options.use_links else 32_768
    beside_links = " beside links" if options.use_links else ""

    limits = [
        ("mem_slots", N, most_slots, beside_links),
        ("mem_width", W, 256, ""),
        ("mem_slots * mem_width", N * W, most_elements, beside_links),
        ("num_reads", R, 8, ""),
    ]
    for name, value, most, beside in limits:
        if value > most:
            return f"{name} {value}: at most {most} are supported{beside}; lower it"

    if state.memory.is_cuda and not torch.compiler.is_compiling():
        return cuda.trial(state.memory.device, N, W, R, options)
    return ""


def shapes_wanted(interface, state, options) -> dict:
    """The shape of each part of an interface and a state, None where it is switched off."""
    B, N, W = state.memory.shape
    T, R = interface.free_gates.shape[1:]
    linked = N if options.use_links else 0
    key_width = options.key_width or W
    steps, heads, slots = (B, T), (B, T, R), (B, N)
    return {
        "write_key": (B, T, key_width),
        "write_strength": steps,
        "erase": (B, T, W),
        "write_vector": (B, T, W),
        "write_gate": steps,
        "allocation_gate": steps,
        "read_keys": (B, T, R, key_width),
        "read_strengths": heads,
        "free_gates": heads,
        "read_modes": (B, T, R, 3) if options.use_links else None,
        "write_mask": None,
        "read_masks": None,
        "sharpening": None,
        "empty": heads if options.empty_slot else None,
        "memory": (B, N, W),
        "usage": slots,
        "write_weights": slots,
        "read_weights": (B, R, N),
        "link": (B, linked, linked),
        "precedence": (B, linked),
    }


def check_shapes(interface, state, options) -> None:
    """Raise ValueError for what the kernels would read beyond its end, or not read at all."""
    B, N, W = state.memory.shape
    T, R = interface.free_gates.shape[1:]
    if 0 in (T, R, N):
        raise ValueError(f"{T} steps, {R} read heads, {N} slots: must be 1 or more of each")
    if options.key_width >= W:
        raise ValueError(f"key_width {options.key_width}: must be below the width of a row, {W}")

    given = {**interface._asdict(), **state._asdict()}
    for name, wanted in shapes_wanted(interface, state, options).items():
        part = given[name]
        shape = None if part is None else tuple(part.shape)
        if shape != wanted:
            raise ValueError(f"{name} {shape}: must be {wanted}, as memory {(B, N, W)}, "
                             f"{T} steps, {R} read heads and use_links {options.use_links} have it")


def refuse_tangents(tensors) -> None:
    """Raise ValueError where a tensor carries a tangent of forward-mode differentiation, which the
    operator would drop without a word: its derivative would be zero."""
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise ValueError("forward-mode differentiation runs in the eager loop alone; "
                         "set scan=\"eager\"")


# ══ The function ═════════════════════════════════════════════════════════════════════════════════


def contiguous_parts(interface) -> list[torch.Tensor]:
    """PARTS of an interface, without elements where they are switched off."""
    if interface.read_modes is None:
        no_modes = interface.read_keys[..., :0]  # (B, T, R, 0)
        interface = interface._replace(read_modes=no_modes)
    if interface.empty is None:
        no_slot = interface.free_gates[..., :0]  # (B, T, 0)
        interface = interface._replace(empty=no_slot)
    return [getattr(interface, name).contiguous() for name in PARTS]


def dnc_scan(interface, state, options, backend: str = "auto"):
    """Run the recurrence of dnc_gpt2.dnc_loop, fused, in the state's type.

    interface (B, T, ...), activated, and a state of B rows -> reads (B, T, R, W - K), write_weights
    (B, T, N), read_weights (B, T, R, N) and the state after the last token. backend: auto, numba
    (CPU) or triton (CUDA). Raises ValueError for shapes that do not fit, and, with what `refusal`
    says, where it cannot run.
    """
    reason = refusal(state, options, backend)
    if reason:
        raise ValueError(reason)
    check_shapes(interface, state, options)
    backend = backend_for(state, backend)
    dtype = state.memory.dtype

    parts = contiguous_parts(interface)
    if backend == "numba" or any(part.dtype != torch.bfloat16 for part in parts):
        parts = [part.to(dtype) for part in parts]
    inputs = [getattr(state, name).to(dtype).contiguous() for name in STATE]
    refuse_tangents((*parts, *inputs))
    differentiable = any(tensor.requires_grad for tensor in (*parts, *inputs))
    record = torch.is_grad_enabled() and differentiable

    outputs = scan_op(parts, inputs, options.dealloc_wipe, options.usage_decay, record,
                      CHECKPOINT_EVERY, backend)
    reads, write_weights, read_weights, memory, usage, link, precedence = outputs[:len(RESULTS)]
    after = state._replace(
        memory=memory,
        usage=usage,
        # Clones: a view would keep the whole trace alive in a carried or saved state.
        write_weights=write_weights[:, -1].clone(),
        read_weights=read_weights[:, -1].clone(),
        link=link,
        precedence=precedence,
    )
    return reads, write_weights, read_weights, after
