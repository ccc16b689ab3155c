"""The attack steps in Triton. The launchers run on CPU tensors too when TRITON_INTERPRET=1."""

# ruff: noqa: N803 - constants of a kernel are written in capitals
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

LINF_BLOCK = 1024
L2_BLOCK = 2048
# No contraction: a + b * c rounds twice, as PyTorch does.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def linf_step_(
    adversarial: Tensor, images: Tensor, gradient: Tensor, step_size: Tensor, epsilon: Tensor
) -> None:
    """Launches `linf_step_kernel` on tensors in one memory order."""
    num_elements = adversarial.numel()
    if num_elements == 0:
        return
    grid = (triton.cdiv(num_elements, LINF_BLOCK),)
    with torch.cuda.device_of(adversarial):
        linf_step_kernel[grid](
            adversarial,
            images,
            gradient,
            step_size,
            epsilon,
            num_elements,
            BLOCK=LINF_BLOCK,
            **OPTIONS,
        )


def l2_step_(
    adversarial: Tensor, images: Tensor, gradient: Tensor, step_size: Tensor, epsilon: Tensor
) -> None:
    """Launches `l2_sums_kernel` and `l2_move_kernel` on tensors in one memory order."""
    if adversarial.numel() == 0:
        return
    num_images = len(adversarial)
    num_pixels = adversarial.numel() // num_images
    num_chunks = triton.cdiv(num_pixels, L2_BLOCK)
    partials = adversarial.new_empty((num_images, 3, num_chunks), dtype=torch.float64)
    grid = (num_images * num_chunks,)
    with torch.cuda.device_of(adversarial):
        l2_sums_kernel[grid](
            adversarial,
            images,
            gradient,
            partials,
            num_pixels,
            num_chunks,
            BLOCK=L2_BLOCK,
            **OPTIONS,
        )
        l2_move_kernel[grid](
            adversarial,
            images,
            gradient,
            partials,
            step_size,
            epsilon,
            num_pixels,
            num_chunks,
            NUM_PARTIALS=triton.next_power_of_2(num_chunks),
            BLOCK=L2_BLOCK,
            **OPTIONS,
        )


@triton.jit
def linf_step_kernel(
    adversarial_ptr,
    images_ptr,
    gradient_ptr,
    step_size_ptr,
    epsilon_ptr,
    num_elements,
    BLOCK: tl.constexpr,
):
    """clamp(clamp(adversarial + step_size * sign(gradient), images -+ epsilon), 0, 1), in place.

    NaN is kept. One pass: reads adversarial, images and gradient, writes adversarial; 16 bytes
    per element in fp32.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_elements
    step_size = tl.load(step_size_ptr)
    epsilon = tl.load(epsilon_ptr)
    adversarial = tl.load(adversarial_ptr + offsets, mask=inside, other=0.0)
    image = tl.load(images_ptr + offsets, mask=inside, other=0.0)
    gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    # neither positive nor negative: zero or NaN, which stay as they are
    direction = tl.where(gradient > 0, 1.0, tl.where(gradient < 0, -1.0, gradient))
    moved = adversarial + step_size * direction
    moved = tl.maximum(moved, image - epsilon, propagate_nan=tl.PropagateNan.ALL)
    moved = tl.minimum(moved, image + epsilon, propagate_nan=tl.PropagateNan.ALL)
    moved = tl.maximum(moved, 0.0, propagate_nan=tl.PropagateNan.ALL)
    moved = tl.minimum(moved, 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(adversarial_ptr + offsets, moved, mask=inside)


@triton.jit
def l2_sums_kernel(
    adversarial_ptr,
    images_ptr,
    gradient_ptr,
    partials_ptr,
    num_pixels,
    num_chunks,
    BLOCK: tl.constexpr,
):
    """`partials[image, :, chunk]` = sums of g^2, d^2 and d * g in fp64; d = adversarial - images.

    First of two passes: reads adversarial, images and gradient; 12 bytes per element in fp32.
    """
    image_index = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    pixels = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = pixels < num_pixels
    offsets = image_index * num_pixels + pixels
    adversarial = tl.load(adversarial_ptr + offsets, mask=inside, other=0.0).to(tl.float64)
    image = tl.load(images_ptr + offsets, mask=inside, other=0.0).to(tl.float64)
    # fp64: the square of a gradient of 1e-20, usual where the model is sure, is 0 in fp32.
    gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float64)
    offset = adversarial - image
    partial_ptr = partials_ptr + image_index * 3 * num_chunks + chunk
    tl.store(partial_ptr, tl.sum(gradient * gradient, axis=0))
    tl.store(partial_ptr + num_chunks, tl.sum(offset * offset, axis=0))
    tl.store(partial_ptr + 2 * num_chunks, tl.sum(offset * gradient, axis=0))


@triton.jit
def l2_move_kernel(
    adversarial_ptr,
    images_ptr,
    gradient_ptr,
    partials_ptr,
    step_size_ptr,
    epsilon_ptr,
    num_pixels,
    num_chunks,
    NUM_PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`adversarial` = clamp(images + scale * (d + step * g), 0, 1).

    step = step_size / ||g|| and scale = min(1, epsilon / ||d + step * g||), both from the sums.

    Second of two passes: reads adversarial, images and gradient, writes adversarial; 16 bytes per
    element in fp32. The sums of an image are added in one order by every program of that image.
    """
    image_index = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunks = tl.arange(0, NUM_PARTIALS)
    chunk_ptrs = partials_ptr + image_index * 3 * num_chunks + chunks
    is_chunk = chunks < num_chunks
    gradient_square = tl.sum(tl.load(chunk_ptrs, mask=is_chunk, other=0.0), axis=0)
    offset_square = tl.sum(tl.load(chunk_ptrs + num_chunks, mask=is_chunk, other=0.0), axis=0)
    cross = tl.sum(tl.load(chunk_ptrs + 2 * num_chunks, mask=is_chunk, other=0.0), axis=0)

    epsilon = tl.load(epsilon_ptr).to(tl.float64)
    is_zero = gradient_square == 0.0
    length = tl.sqrt(tl.where(is_zero, 1.0, gradient_square))
    step = tl.where(is_zero, 0.0, tl.load(step_size_ptr).to(tl.float64) / length)
    square = offset_square + 2.0 * step * cross + step * step * gradient_square
    # Cancellation may leave a tiny negative number; NaN has to stay.
    distance = tl.sqrt(tl.where(square < 0.0, 0.0, square))
    scale = tl.where(distance <= epsilon, 1.0, epsilon / distance)

    pixels = (tl.program_id(0) % num_chunks) * BLOCK + tl.arange(0, BLOCK)
    inside = pixels < num_pixels
    offsets = image_index * num_pixels + pixels
    adversarial = tl.load(adversarial_ptr + offsets, mask=inside, other=0.0).to(tl.float64)
    image = tl.load(images_ptr + offsets, mask=inside, other=0.0).to(tl.float64)
    gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float64)
    moved = (image + scale * (adversarial - image + step * gradient)).to(tl.float32)
    moved = tl.maximum(moved, 0.0, propagate_nan=tl.PropagateNan.ALL)
    moved = tl.minimum(moved, 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(adversarial_ptr + offsets, moved, mask=inside)
