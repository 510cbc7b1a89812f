"""What two ranks check, on CPUs and on GPUs alike: a function of the rank's device a case."""

from __future__ import annotations

from tests.distributed import collectives, gpt, wrapped
from tests.distributed.ranks import Case

CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        wrapped.ddp_around_compiled,
        wrapped.compiled_around_ddp_in_buckets,
        wrapped.compiled_around_ddp_whole,
        wrapped.gradients_in_one_memory_under_ddp,
        wrapped.gradients_in_one_memory_sharded,
        wrapped.buffers_under_ddp,
        wrapped.sharded_blocks_compiled,
        wrapped.compiled_around_sharded,
        collectives.collectives_in_a_graph,
        collectives.gradients_through_collectives,
        gpt.gpt_under_ddp,
        gpt.gpt_under_ddp_in_bfloat16,
        gpt.gpt_under_ddp_in_cuda_graphs,
        gpt.gpt_and_its_optimizer_compiled,
        gpt.gpt_sharded,
        gpt.gpt_of_sharded_compiled_blocks,
        gpt.linear_cross_entropy_under_ddp,
        gpt.linear_cross_entropy_sharded,
        gpt.dropout_trains_as_eager,
        gpt.dropout_differs_between_ranks,
        gpt.dropout_is_repeated_by_its_seeds,
        gpt.gpt_on_every_device_while_another_is_current,
        gpt.gpt_on_a_stream_of_its_own,
    )
}
