"""Names of workloads to what they run."""

import pytest

from plexor.benchmark.workloads import Workload, parse_workloads
from plexor.errors import ConfigError


def test_names_say_requests_and_lengths() -> None:
    assert parse_workloads("decode_bs3, prefill_8k,serve_1024_128") == (
        Workload("decode_bs3", "decode", 3, 128, 256),
        Workload("prefill_8k", "prefill", 1, 8192, 1),
        Workload("serve_1024_128", "serve", 512, 1024, 128),
    )


def test_start_comes_first_and_nothing_twice() -> None:
    names = [workload.name for workload in parse_workloads("prefill_1k,start,prefill_1k,decode_bs2")]
    assert names == ["start", "prefill_1k", "decode_bs2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("decode_8", "there is no workload 'decode_8': did you mean 'decode_bs8'?"),
        ("start,", "there is no workload '': known are decode_bs1, "),
        ("decode_bs0", "there is no workload 'decode_bs0'"),
        ("prefill_0k", "there is no workload 'prefill_0k'"),
        ("serve_8_0", "there is no workload 'serve_8_0'"),
        ("decode_bs1x", "there is no workload 'decode_bs1x'"),
    ],
)
def test_an_unknown_name_is_refused_with_a_guess(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said[:30]}") as caught:
        parse_workloads(text)
    assert str(caught.value).startswith(said)
