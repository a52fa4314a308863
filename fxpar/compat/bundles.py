"""bundles: code of forwards and backwards that is put together here, on disk beside what Inductor keeps there."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import pickle
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode

log = logging.getLogger("fxpar")


def bundle_key(text: str) -> str | None:
    """The name under which code is kept that depends on `text`, on how Inductor and AOTAutograd are set, on their sources and on
    the machine; None where Inductor's cache is off."""
    from torch._functorch import config as aot
    from torch._inductor import config
    from torch._inductor.codecache import CacheBase, torch_key

    if not config.fx_graph_cache or config.force_disable_caches:
        return None
    parts = [text, torch_key().hex(), str(CacheBase.get_system()), config.save_config_portable(), aot.save_config_portable()]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def keep_bundle(key: str, codes: Sequence[Any], more: Any) -> None:
    """Keep codes of `compile_final`, and `more`, which can be pickled. Nothing is kept of what Inductor cannot keep."""
    from torch._dynamo.utils import counters
    from torch._inductor.codecache import write_atomic

    counters["aot_autograd"]["autograd_cache_miss"] += 1
    ready = [copy.copy(code) for code in codes]
    try:
        for code in ready:
            code.prepare_for_serialization()
        content = pickle.dumps((ready, more))
    except (TypeError, AttributeError, pickle.PicklingError, NotImplementedError):
        return
    os.makedirs(os.path.dirname(_path(key)), exist_ok=True)
    write_atomic(_path(key), content)
    counters["aot_autograd"]["autograd_cache_saved"] += 1


def kept_bundle(key: str, given: Sequence[Tensor]) -> tuple[list[Any], Any] | None:
    """What was kept under `key`, ready to run on inputs like `given`; None where nothing is, or a part of it is gone."""
    from torch._dynamo.utils import counters
    from torch._inductor.cudagraph_utils import BoxedDeviceIndex
    from torch._inductor.output_code import CompiledFxGraphConstants
    from torch._inductor.utils import BoxedBool

    try:
        with open(_path(key), "rb") as file:
            codes, more = pickle.load(file)
        with tracing(TracingContext(FakeTensorMode())):
            for number, code in enumerate(codes):
                options: Any = {"cudagraphs": BoxedBool(False), "is_backward": number > 0,
                                "boxed_forward_device_index": BoxedDeviceIndex(None)}
                code.post_compile(given, CompiledFxGraphConstants(), options)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with what others may have written is no reason not to compile anew
        log.info("compiled code on disk could not be used (%s: %s)", type(error).__name__, error)
        return None
    counters["aot_autograd"]["autograd_cache_hit"] += 1
    return codes, more


def _path(key: str) -> str:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return os.path.join(cache_dir(), "fxpar", key[:2], key)
