from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw_chest

from cbedge import (
    BundleError,
    CbedgeError,
    ContextError,
    DeviceError,
    DraftRequest,
    OptionError,
    RadiographError,
    Report,
    ReportGenerator,
)
from cbedge.images.radiograph import load_radiograph


@pytest.fixture(scope="module")
def generator(tiny_bundle: Path) -> ReportGenerator:
    return ReportGenerator.from_pretrained(tiny_bundle, device="cpu")


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({"model": 5}, BundleError, "model must be the path of a folder, not int"),
        ({"model": ["a"]}, BundleError, "model must be the path of a folder, not list"),
        ({"model": b"/tmp"}, BundleError, "model must be the path of a folder, not bytes"),
        ({"variant": 3}, BundleError, "variant must be text, not int"),
        ({"variant": ""}, BundleError, "unknown variant ''"),
        ({"device": None}, DeviceError, "device must be text, not NoneType"),
        ({"device": "gpu"}, DeviceError, "unknown device 'gpu'"),
        ({"threads": 0}, ContextError, "threads is 0; give 1 to 1,024"),
        ({"threads": 10**9}, ContextError, "threads is 1000000000; give 1 to 1,024"),
        ({"threads": "2"}, ContextError, "threads must be a whole number, not str"),
        ({"threads": True}, ContextError, "threads must be a whole number, not bool"),
        ({"recent_studies": "4"}, ContextError, "recent_studies must be a whole number, not str"),
        ({"recent_studies": 2.5}, ContextError, "recent_studies must be a whole number, not float"),
        ({"recent_studies": 65}, ContextError, "recent_studies is 65; give 0 to 64"),
    ],
)
def test_a_generator_is_not_opened_with_wrong_arguments(tiny_bundle: Path, options: dict, kind: type, told: str):
    with pytest.raises(kind) as raised:
        ReportGenerator.from_pretrained(**{"model": tiny_bundle, "device": "cpu", **options})
    assert str(raised.value).startswith(told)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"accept_any_image": "no"}, "accept_any_image must be True or False, not str"),
        ({"accept_any_image": None}, "accept_any_image must be True or False, not NoneType"),
        ({"template": False}, "the template must be text, not bool"),
        ({"template": Path("normal.txt")}, "the template must be text, not PosixPath"),
        ({"template": b"The lungs are clear."}, "the template must be text, not bytes"),
        ({"indicaton": "cough"}, "a request has no 'indicaton'; it has: image, lateral, indication"),
        ({"decoding": {"beam": 2}}, "decoding has no 'beam'; it has: temperature"),
        ({"decoding": {5: 1}}, "decoding has no '5'"),
        ({"decoding": []}, "decoding must be a Decoding or a mapping of its settings, not list"),
        ({"decoding": {"beams": True}}, "beams must be a whole number, not bool"),
        ({"max_new_tokens": 1025}, "max_new_tokens is 1025; give 1 to 1,024"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number, not str"),
    ],
)
def test_a_wrong_option_is_named_with_its_type(generator: ReportGenerator, options: dict, told: str):
    image = draw_chest(0)
    with pytest.raises(ContextError) as raised:
        generator.generate(image, **options)
    assert str(raised.value).startswith(told)
    (result,) = generator.generate_many([{"image": image, **options}])
    assert isinstance(result, ContextError) and str(result).startswith(told)


def test_requests_of_another_shape_are_refused_each_for_itself(generator: ReportGenerator):
    good: dict[str, Any] = {"image": draw_chest(0), "max_new_tokens": 8}
    results = generator.generate_many(["a.png", None, {}, {"image": None}, {5: 6}, DraftRequest(**good), good])  # type: ignore[list-item]
    kinds = [OptionError, OptionError, ContextError, RadiographError, OptionError, Report, Report]
    assert [type(result) for result in results] == kinds
    wanted = "a request must be a DraftRequest or a mapping of its fields, not str"
    assert str(results[0]) == wanted and str(results[2]) == "a request has no image: give the field image"
    for requests in ("a.png", b"a", None, 5, good, DraftRequest(**good)):
        with pytest.raises(ContextError, match="requests must be a sequence of requests, not"):
            generator.generate_many(requests)  # type: ignore[arg-type]


def test_options_beside_a_whole_request_replace_its_fields(generator: ReportGenerator):
    request = DraftRequest(draw_chest(0), indication="cough", max_new_tokens=8)
    report = generator.generate(request, indication=None)
    assert report.indication_source is None and report.new_tokens <= 8
    with pytest.raises(ContextError, match="a request has no 'indicaton'"):
        generator.generate(request, indicaton="x")  # type: ignore[call-arg]


def test_a_template_to_keep_to_is_text(generator: ReportGenerator):
    for template in (None, Path("normal.txt"), 5):
        with pytest.raises(ContextError, match="the template must be text, not"):
            generator.keep_to(template)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # np.matrix
def test_subclasses_of_arrays_are_read_as_arrays_and_masked_pixels_are_refused():
    film = draw_chest(0)
    wanted = load_radiograph(film)
    masked = np.ma.MaskedArray(film, mask=False)
    for array in (np.matrix(film), masked, film.view(np.memmap)):
        found = load_radiograph(array)
        assert np.array_equal(found.pixels, wanted.pixels) and found.sha256 == wanted.sha256
        assert type(found.pixels) is np.ndarray
    masked[3, 3] = np.ma.masked
    with pytest.raises(RadiographError, match="masked pixels: give them a value"):
        load_radiograph(masked)


def test_messages_hold_no_value(generator: ReportGenerator):
    class Secret(str):
        """Shows a patient's name wherever it is formatted."""

    for options in ({"decoding": Secret("Doe^John")}, {"accept_any_image": "Doe^John"}):
        with pytest.raises(CbedgeError) as raised:
            generator.generate(draw_chest(0), **options)
        assert "Doe" not in str(raised.value)
