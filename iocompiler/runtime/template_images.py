"""The cubins of templates: from the cache or the worker processes, one for all launches of a form,
whoever asks first; `prepare` asks ahead of the launch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future

from iocompiler.runtime.cache import default_cache, key_of
from iocompiler.runtime.kernels import compiled_images
from iocompiler.runtime.launch import Image
from iocompiler.runtime.template_form import Form, TemplateJob

_MOST = 4096
_images: dict[Form, Future[Image]] = {}
_lock = threading.Lock()


def image(form: Form) -> Image:
    """The cubin of a form, compiled here and now unless it is, or is being, elsewhere.

    Raises:
        CompileError: it does not compile. It is tried again when it is asked for again.
    """
    found, is_new = _claimed(form)
    if is_new:
        _find(form, found)
    return found.result()


def prepare(forms: Iterable[Form]) -> dict[Form, Future[Image]]:
    """Have these compiled in the background; a failure is told to who asks for the image."""
    places: dict[Form, Future[Image]] = {}
    for form in forms:
        found, is_new = _claimed(form)
        places[form] = found
        if is_new:
            # no thread of a pool's: those are waited for when the program ends
            threading.Thread(target=_find, args=(form, found), daemon=True).start()
    return places


def _claimed(form: Form) -> tuple[Future[Image], bool]:
    """The place of an image, and whether the caller is the one to fill it."""
    with _lock:
        known = _images.get(form)
        if known is not None:
            return known, False
        if len(_images) >= _MOST:
            _images.clear()
        made = _images[form] = Future()
        return made, True


def _find(form: Form, place: Future[Image]) -> None:
    try:
        place.set_result(_compiled(form))
    except BaseException as error:
        with _lock:
            _images.pop(form, None)
        place.set_exception(error)


def _compiled(form: Form) -> Image:
    job = TemplateJob(form)
    key = key_of("template", job.as_json())
    return compiled_images({key: job}, default_cache())[key]


def _forget() -> None:
    """In a forked child: nobody fills the places that the parent's threads were to fill, and a lock
    some thread held, a place's own too, stays held.
    """
    global _images, _lock
    _images, _lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_forget)
