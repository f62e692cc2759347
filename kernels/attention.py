"""Absorbed latent attention over a paged cache, ragged: every token sees its own sequence's past.

Shapes: `T` tokens, `N` heads, `W` cache width, `C` latent, `B` blocks, `S` block size, `Q` sequences, `M` blocks
of the longest table.
"""

import ctypes

import torch
from torch import Tensor

from kernels.native import check_dense, native_for, triton_serves


def latent_attention(
    q_TNW: Tensor,
    cache_BSW: Tensor,
    block_tables_QM: Tensor,
    sequence_T: Tensor,
    position_T: Tensor,
    latent: int,
    scale: float,
) -> Tensor:
    """softmax(q · key · scale) · key[:latent] for each token over positions 0..position of its sequence, [T, N, C].

    Key j of sequence s lies in cache[block_tables[s, j // S], j % S]; tables, sequences and positions are int32.
    Tokens of one sequence follow one another in rising position. The order of each sum is a function of the
    token's position alone, so chunking, batching and the choice of blocks never change its bits.
    """
    native = native_for(q_TNW.device)
    if native is not None:
        return _native_attention(native, q_TNW, cache_BSW, block_tables_QM, sequence_T, position_T, latent, scale)
    if triton_serves(q_TNW.device):
        from kernels.gpu import attention

        return attention.latent_attention(q_TNW, cache_BSW, block_tables_QM, sequence_T, position_T, latent, scale)
    size = cache_BSW.shape[1]
    out_TNC = torch.empty(*q_TNW.shape[:2], latent, dtype=q_TNW.dtype, device=q_TNW.device)
    gathered: dict[int, Tensor] = {}
    lasts: dict[int, int] = {}
    owners, positions = sequence_T.tolist(), position_T.tolist()
    for owner, position in zip(owners, positions, strict=True):
        lasts[owner] = max(lasts.get(owner, 0), position)
    for token, (owner, position) in enumerate(zip(owners, positions, strict=True)):
        if owner not in gathered:
            blocks = block_tables_QM[owner, : lasts[owner] // size + 1].long()
            gathered[owner] = cache_BSW[blocks].flatten(0, 1)
        keys_JW = gathered[owner][: position + 1]
        q_NW = q_TNW[token].clone()  # at an address that BLAS sees alike for every token: it sums by alignment, too
        weights_NJ = torch.softmax((q_NW @ keys_JW.t()).float() * scale, dim=-1)
        out_TNC[token] = weights_NJ.to(keys_JW.dtype) @ keys_JW[:, :latent]
    return out_TNC


def _native_attention(
    native: ctypes.CDLL,
    q_TNW: Tensor,
    cache_BSW: Tensor,
    block_tables_QM: Tensor,
    sequence_T: Tensor,
    position_T: Tensor,
    latent: int,
    scale: float,
) -> Tensor:
    tokens, heads, width = q_TNW.shape
    check_dense(torch.float32, q_TNW, cache_BSW)
    check_dense(torch.int32, sequence_T, position_T)
    assert block_tables_QM.dtype is torch.int32
    assert block_tables_QM.stride(1) == 1
    assert sequence_T.shape == position_T.shape == (tokens,)
    assert cache_BSW.shape[2] == width
    out_TNC = torch.empty(tokens, heads, latent)
    native.shoal_latent_attention(
        q_TNW.data_ptr(),
        cache_BSW.data_ptr(),
        block_tables_QM.data_ptr(),
        block_tables_QM.stride(0),
        cache_BSW.shape[1],
        sequence_T.data_ptr(),
        position_T.data_ptr(),
        tokens,
        heads,
        width,
        latent,
        scale,
        out_TNC.data_ptr(),
    )
    return out_TNC
