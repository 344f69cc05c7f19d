"""The simulator: the names of the device's primitives, and an error for whatever a device would do wrong in silence."""

import re
from pathlib import Path

import numpy as np
import pytest

from refattn.engines.cuda import sim, simulator
from refattn.engines.cuda.simulator import SimulationError, launch

PTX = Path(simulator.__file__).with_name("ptx.py").read_text()


def run(kernel, *arguments, threads=64, words=64, seed=0, **options):
    launch(kernel, (1, 1, 1), threads, words, arguments, seed=seed, **options)


def pointer(*shape, kind=np.float32):
    return sim.Pointer(np.zeros(shape, kind))


def test_the_primitives_have_the_same_names():
    listed = re.search(r"__all__ = \[(.*?)\]", PTX, re.DOTALL)
    assert sorted(re.findall(r'"(\w+)"', listed[1])) == sorted(sim.__all__)
    assert all(callable(getattr(sim, name)) for name in sim.__all__)


def test_memory_that_nobody_has_written_is_not_read():
    with pytest.raises(SimulationError, match="nobody has written"):
        run(lambda: sim.get(sim.thread()))
    assert np.isnan(sim.local(3)[1])


def test_a_write_is_seen_by_others_after_a_barrier_only():
    def neighbour(out, guard):
        n = sim.thread()
        sim.put(n, np.float32(n))
        guard()
        sim.write(out, n, sim.get(n ^ 33))

    out = pointer(64)
    run(neighbour, out, sim.barrier)
    assert np.array_equal(out.memory, np.arange(64) ^ 33)
    for guard in (lambda: None, sim.warp_sync):
        with pytest.raises(SimulationError, match=r"race|nobody has written"):
            run(neighbour, out, guard)


def test_a_warp_needs_a_sync_of_its_own():
    def neighbour(guard):
        sim.put(sim.thread(), np.float32(1))
        guard()
        sim.get(sim.thread() ^ 1)

    run(neighbour, sim.warp_sync)
    with pytest.raises(SimulationError, match=r"race|nobody has written"):
        run(neighbour, lambda: None)


def test_a_word_is_not_written_before_others_have_read_it():
    def reused(guard):
        sim.put(sim.thread(), np.float32(1))
        sim.barrier()
        sim.get(sim.thread() ^ 32)
        guard()
        sim.put(sim.thread(), np.float32(2))

    run(reused, sim.barrier)
    with pytest.raises(SimulationError, match="race"):
        run(reused, lambda: None)


@pytest.mark.parametrize("seed", range(4))
def test_a_copy_has_arrived_after_its_wait(seed):
    def copied(out, given, wait):
        n = sim.thread()
        sim.copy4(n, given, n, n < 60)
        sim.commit()
        wait(0)
        sim.write(out, n, sim.get(n))

    given, out = sim.Pointer(np.arange(64, dtype=np.float32)), pointer(64)
    run(copied, out, given, sim.wait, seed=seed)
    assert np.array_equal(out.memory, np.where(np.arange(64) < 60, np.arange(64), 0))
    with pytest.raises(SimulationError, match="in flight"):
        run(copied, out, given, lambda n: None, seed=seed)


def test_lanes_and_warps_do_not_part():
    with pytest.raises(SimulationError, match="part"):
        run(lambda: sim.warp_sync() if sim.thread() != 3 else None)
    with pytest.raises(SimulationError, match="ended"):
        run(lambda: sim.barrier() if sim.thread() < 32 else None)
    with pytest.raises(SimulationError, match="part"):
        run(lambda: sim.barrier() if sim.thread() < 32 else sim.barrier_or(True))


def test_addresses_are_inside_and_aligned():
    with pytest.raises(SimulationError, match="elements"):
        run(lambda p: sim.read(p, sim.thread() - 1), pointer(64))
    with pytest.raises(SimulationError, match="words"):
        run(lambda: sim.put(2 * sim.thread(), np.float32(0)))
    with pytest.raises(SimulationError, match="aligned"):
        run(lambda p: sim.copy16(4 * sim.thread(), p, sim.thread(), sim.thread() < 60), pointer(64), words=256)


def test_a_kernel_that_does_not_end_meets_the_time_limit():
    def endless():
        while True:
            sim.barrier()

    with pytest.raises(SimulationError, match="time limit"):
        run(endless, limit=0.05)


def test_votes_and_shuffles():
    def vote(out, bit):
        n = sim.thread()
        sim.write(out, n, np.float32(sim.barrier_or(n == bit)) + 10 * sim.shuffle_xor(np.float32(n), 5))

    out = pointer(64)
    run(vote, out, 40)
    assert np.array_equal(out.memory, 1 + 10 * (np.arange(64) ^ 5))
    run(vote, out, 64)
    assert np.array_equal(out.memory, 10 * (np.arange(64) ^ 5))


@pytest.mark.parametrize(("mma", "pack"), [(sim.mma_bf16, sim.pack_bf16), (sim.mma_f16, sim.pack_f16)])
def test_a_product_of_fragments_is_the_product_of_matrices(mma, pack, rng):
    """Against the layout that the PTX manual draws: A row-major, B by columns, pairs beside each other."""
    a, b = rng.integers(-8, 9, (16, 16)).astype(np.float32), rng.integers(-8, 9, (16, 8)).astype(np.float32)

    def multiply(out):
        lane = sim.thread()
        row, two = lane // 4, 2 * (lane % 4)
        places = ((row, two), (row + 8, two), (row, two + 8), (row + 8, two + 8))
        left = tuple(pack(a[i, j], a[i, j + 1]) for i, j in places)
        low, high = pack(b[two, row], b[two + 1, row]), pack(b[two + 8, row], b[two + 9, row])
        found = mma((np.float32(1),) * 4, left, low, high)
        for n, (i, j) in enumerate(((row, two), (row, two + 1), (row + 8, two), (row + 8, two + 1))):
            sim.write(out, 8 * i + j, found[n])

    out = pointer(128)
    run(multiply, out, threads=32)
    assert np.array_equal(out.memory.reshape(16, 8), a @ b + 1)


@pytest.mark.parametrize("turned", [False, True])
def test_ldmatrix_hands_each_lane_two_numbers_of_four_matrices(turned):
    load = sim.ldmatrix_t if turned else sim.ldmatrix

    def loaded(out):
        lane = sim.thread()
        for n in range(4):
            sim.put_bits(4 * lane + n, sim.join(8 * lane + 2 * n, 8 * lane + 2 * n + 1))
        sim.warp_sync()
        for n, word in enumerate(load(4 * lane)):
            sim.write(out, 4 * lane + n, word)

    out = pointer(128, kind=np.int32)
    run(loaded, out, threads=32, words=128)
    matrices = np.arange(256).reshape(4, 8, 8)
    matrices = matrices.swapaxes(1, 2) if turned else matrices
    for lane in range(32):
        for n, word in enumerate(out.memory[4 * lane : 4 * lane + 4]):
            assert [word & 0xFFFF, word >> 16] == list(matrices[n, lane // 4, 2 * (lane % 4) :][:2])
