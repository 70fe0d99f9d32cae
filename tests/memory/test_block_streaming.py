"""Streamed blocks give the bits of resident ones, in any order of use, and hold no more than their slots."""

from __future__ import annotations

import pytest
import torch

from lapwan.lora.attach import Group, attach, initial_state
from lapwan.memory.streaming import BlockRing, HostPool, offload_backbone, tensors_of
from lapwan.models.base import Base
from lapwan.names import NoiseExpert, Precision
from lapwan.wan.backbone import WanBackbone, load_transformer
from lapwan.wan.quantise.load import Recipe, load_quantised_transformer

CPU = torch.device("cpu")


def inputs(spec, batch: int = 1):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batch, *spec.latent_shape(5, 32, 48), generator=generator)
    return x, torch.full((batch,), 700.0), torch.randn(batch, 512, spec.text_dim, generator=generator) * 0.3


@pytest.fixture(params=[None, *(
    p if p is Precision.NF4 else pytest.param(p, marks=pytest.mark.slow) for p in Precision
)], ids=lambda p: p.value if p else "plain")
def loaded(request, tiny_t2v, own_cache):
    if request.param is None:
        return tiny_t2v, WanBackbone(load_transformer(tiny_t2v, NoiseExpert.LOW))
    return tiny_t2v, Base(tiny_t2v).load(NoiseExpert.LOW, recipe=Recipe(request.param))


@torch.no_grad()
def test_streamed_is_resident_bit_for_bit(loaded) -> None:
    spec, model = loaded
    expected = [model.velocity(*inputs(spec, batch)) for batch in (1, 2)]
    offload = offload_backbone(model, (), CPU, range(8))
    offload.onload()
    for _ in range(2):
        assert torch.equal(model.velocity(*inputs(spec)), expected[0])
    assert torch.equal(model.velocity(*inputs(spec, 2)), expected[1])
    offload.offload()
    offload.onload()
    assert torch.equal(model.velocity(*inputs(spec)), expected[0])


@torch.no_grad()
@pytest.mark.parametrize(("streamed", "slots"), [
    ((0,), 2), ((0, 1), 2), ((0, 1), 3), ((2, 3, 4), 1), ((2, 3, 4), 2), ((1, 5, 7), 3), (tuple(range(7)), 2),
])
def test_any_blocks_and_any_slots(streamed, slots, tiny_t2v) -> None:
    model = WanBackbone(load_transformer(tiny_t2v, NoiseExpert.HIGH))
    expected = model.velocity(*inputs(tiny_t2v))
    model.options.residency = BlockRing({i: tensors_of(model.transformer.blocks[i]) for i in streamed}, CPU, slots)
    for _ in range(3):
        assert torch.equal(model.velocity(*inputs(tiny_t2v)), expected)


def test_every_forward_copies_each_block_once(tiny_t2v) -> None:
    model = WanBackbone(load_transformer(tiny_t2v, NoiseExpert.HIGH))
    ring = BlockRing({i: tensors_of(model.transformer.blocks[i]) for i in range(8)}, CPU)
    block = sum(-(-t.nbytes // 256) * 256 for t in tensors_of(model.transformer.blocks[0]))
    assert ring.ring_bytes == 2 * block and ring.copied_bytes == 0
    model.stream(ring)
    with torch.no_grad():
        for count in (1, 2, 3):
            model.velocity(*inputs(tiny_t2v))
            assert ring.copied_bytes == (8 * count + 2) * block  # and the first two of the next


@torch.no_grad()
def test_a_forward_cut_short_does_not_mix_up_the_next(tiny_t2v) -> None:
    model = WanBackbone(load_transformer(tiny_t2v, NoiseExpert.HIGH))
    expected = model.velocity(*inputs(tiny_t2v))

    class Interrupted(BlockRing):
        stops_at: int | None = 3

        def done(self, index: int) -> None:
            super().done(index)
            if index == self.stops_at:
                raise KeyboardInterrupt

    ring = model.options.residency = Interrupted({i: tensors_of(model.transformer.blocks[i]) for i in range(6)}, CPU)
    with pytest.raises(KeyboardInterrupt):
        model.velocity(*inputs(tiny_t2v))
    ring.stops_at = None
    assert torch.equal(model.velocity(*inputs(tiny_t2v)), expected)


def test_a_block_that_is_not_there_yet_is_seen_if_it_were_used(tiny_t2v) -> None:
    """The slots are what computes: another number in a slot changes the result, so equality above says something."""
    model = WanBackbone(load_transformer(tiny_t2v, NoiseExpert.HIGH))
    with torch.no_grad():
        expected = model.velocity(*inputs(tiny_t2v))
        ring = model.options.residency = BlockRing({0: tensors_of(model.transformer.blocks[0])}, CPU)
        ring.start()
        ring._slots[0].memory.view(torch.float32)[:1000] += 1.0
        assert not torch.equal(model.velocity(*inputs(tiny_t2v)), expected)


def test_training_over_a_streamed_prefix_has_the_resident_gradients(tiny_t2v) -> None:
    gradients = []
    for streamed in ((), range(6)):
        model = WanBackbone(load_transformer(tiny_t2v, NoiseExpert.LOW))
        ranks = {f"blocks.{i}.attn1.to_{part}": 4 for i in (6, 7) for part in "qv"}
        state = initial_state(model.transformer, ranks, None, 3)
        for entry in state.entries.values():
            entry.up.normal_(generator=torch.Generator().manual_seed(1))
        adapter = attach(model.transformer, [Group("lora", state, trainable=True)])
        if streamed:
            offload_backbone(model, adapter.adapter_tensors(), CPU, streamed).onload()
        for _ in range(2):
            model.velocity(*inputs(tiny_t2v)).square().mean().backward()
        gradients.append({name: p.grad for name, p in adapter.parameters().items()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0 and torch.equal(gradient, gradients[1][name]), name


def test_adapters_rows_stay_while_their_block_streams(tiny_t2v) -> None:
    model = WanBackbone(load_transformer(tiny_t2v, NoiseExpert.LOW))
    state = initial_state(model.transformer, {"blocks.2.attn1.to_q": 4}, None, 3)
    adapter = attach(model.transformer, [Group("lora", state, trainable=True)])
    addresses = {name: p.data_ptr() for name, p in adapter.parameters().items()}
    offload = offload_backbone(model, adapter.adapter_tensors(), CPU, range(8))
    offload.onload()
    with torch.no_grad():
        model.velocity(*inputs(tiny_t2v))
    offload.offload()
    assert addresses == {name: p.data_ptr() for name, p in adapter.parameters().items()}


def test_host_memory_is_cut_into_aligned_pieces() -> None:
    pool = HostPool(pinned=False)
    pieces = [pool.allocate(size) for size in (3, 300, 256)]
    assert [len(piece) for piece in pieces] == [3, 300, 256]
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    assert torch.equal(pool.copy_of(tensor), tensor)


def test_what_is_in_the_pool_already_is_not_copied() -> None:
    pool, other = HostPool(pinned=False, chunk_size=4096), HostPool(pinned=False)
    first, second = pool.copy_of(torch.arange(40)), pool.copy_of(torch.ones(3))
    assert pool.copy_of(first).data_ptr() == first.data_ptr()
    assert pool.copy_of(second).data_ptr() == second.data_ptr()
    assert other.copy_of(first).data_ptr() != first.data_ptr()


def test_quantised_weights_stay_where_they_were_put(tiny_t2v, tmp_path) -> None:
    """A pool that takes the codes while they are read is the memory that blocks stream from."""
    def load(pool: HostPool | None) -> WanBackbone:
        return WanBackbone(load_quantised_transformer(
            tiny_t2v, NoiseExpert.HIGH, Recipe(Precision.FP8), "pooled", torch.float32,
            to_host=None if pool is None else pool.copy_of))

    expected = load(None).velocity(*inputs(tiny_t2v)).detach()
    for cached in (False, True):
        pool = HostPool(pinned=False, chunk_size=1 << 20)
        model = load(pool)
        addresses = [t.data_ptr() for t in tensors_of(model.transformer)]
        offload = offload_backbone(model, (), CPU, range(4), pool)
        assert [t.data_ptr() for t in tensors_of(model.transformer)] == addresses, f"cached: {cached}"
        offload.onload()
        with torch.no_grad():
            assert torch.equal(model.velocity(*inputs(tiny_t2v)), expected)


def test_a_block_is_one_copy_as_far_as_its_memory_lies_together(tiny_t2v) -> None:
    model = WanBackbone(load_transformer(tiny_t2v, NoiseExpert.HIGH))
    expected = model.velocity(*inputs(tiny_t2v)).detach()
    block = sum(-(-t.nbytes // 256) * 256 for t in tensors_of(model.transformer.blocks[0]))
    ring = model.options.residency = BlockRing(
        {i: tensors_of(model.transformer.blocks[i]) for i in range(8)}, CPU, pool=HostPool(False, int(2.5 * block)))
    spans = [len(ring._blocks[i].spans) for i in range(8)]
    assert sum(spans) < 14 and max(spans) == 2 and min(spans) == 1
    with torch.no_grad():
        assert torch.equal(model.velocity(*inputs(tiny_t2v)), expected)
