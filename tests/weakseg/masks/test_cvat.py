import contextlib
import xml.etree.ElementTree as ET

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given

from tests.weakseg.masks.label_maps import CLASSES, MANY, assert_same, random_images, small_maps, wide_maps
from weakseg.classes import ClassTable, voc_palette
from weakseg.errors import DataError, UnknownClassError, UsageError
from weakseg.masks import cvat
from weakseg.masks.cvat import annotations_xml, labelmap_txt, mask_from_points, points_from_mask, read_xml
from weakseg.masks.labelled import LabelledImage

kinds = st.sampled_from(["mask", "polygon"])


def file_of(images, classes=CLASSES, **options):
    return b"".join(annotations_xml(images, classes, **options))


# The SDK's points -----------------------------------------------------------------------------------------------------


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)))
@example(np.zeros((2, 3), bool))
@example(np.ones((1, 1), bool))
def test_points_come_back(mask):
    points = points_from_mask(mask)
    np.testing.assert_array_equal(mask_from_points(points, *mask.shape), mask)
    np.testing.assert_array_equal(mask_from_points([float(n) for n in points], *mask.shape), mask)
    left, top, right, bottom = points[-4:]
    assert sum(points[:-4]) == (right - left + 1) * (bottom - top + 1) and all(run > 0 for run in points[1:-4])


def test_points_by_hand():
    mask = np.zeros((4, 6), bool)
    assert points_from_mask(mask) == [1, 0, 0, 0, 0]
    mask[1, 2:4] = True
    assert points_from_mask(mask) == [0, 2, 2, 1, 3, 1]
    mask[2, 4] = True
    assert points_from_mask(mask) == [0, 2, 3, 1, 2, 1, 4, 2]
    mask[1, 2] = False
    assert points_from_mask(mask) == [0, 1, 2, 1, 3, 1, 4, 2]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([0, 1, 0, 0], "whole numbers"),
        ([], "whole numbers"),
        ([0, 0.5, 0.5, 0, 0, 0, 0], "whole numbers"),
        ([0, float("nan"), 0, 0, 0, 0], "whole numbers"),
        ([0, "1", 0, 0, 0, 0], "whole numbers"),
        ([0, 1, -1, 0, -1, 0], "within the image"),
        ([0, 1, 3, 0, 3, 0], "within the image"),
        ([0, 1, 1, 0, 0, 0], "within the image"),
        ([0, 10**400, 0, 0, 0, 10**400], "within the image"),
        ([0, 3, 0, 0, 1, 0], "2 x 1 pixels"),
        ([3, -1, 0, 0, 1, 0], "2 x 1 pixels"),
        ([10**400, 0, 0, 1, 0], "2 x 1 pixels"),
    ],
)
def test_damaged_points_are_refused(points, message):
    with pytest.raises(DataError, match=message):
        mask_from_points(points, 2, 3)


# CVAT for images: there and back --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "kind"), [(CLASSES, "mask"), (CLASSES, "polygon"), (MANY, "mask")])
def test_500_maps_come_back(classes, kind):
    images = list(random_images(classes))
    back = read_xml(file_of(images, classes, kind=kind), classes)
    for image, again in zip(images, back, strict=True):
        assert_same(again, image)


@given(small_maps, kinds, st.sampled_from([0, 0.25, 0.5]), st.sampled_from([None, "un<sure>"]))
def test_a_map_comes_back(labels, kind, tolerance, ignore):
    before, image = labels.copy(), LabelledImage("a/b.png", labels)
    (again,) = read_xml(file_of([image], kind=kind, tolerance_px=tolerance, ignore=ignore), CLASSES, ignore=ignore)
    np.testing.assert_array_equal(labels, before)
    assert_same(again, image, ignore=ignore is not None)


@given(wide_maps, kinds)
def test_a_map_of_16_bits_comes_back(labels, kind):
    image = LabelledImage("a.png", labels)
    assert_same(next(read_xml(file_of([image], MANY, kind=kind, ignore="?"), MANY, ignore="?")), image, True)


xml_names = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufffe\uffff"), max_size=20)


@given(xml_names | st.sampled_from(["a\tb\nc\rd.jpg", "\"'<>&.jpg", "]]>"]))
def test_any_name_comes_back(name):
    (again,) = read_xml(file_of([LabelledImage(name, np.ones((1, 1), np.uint8))]), CLASSES)
    assert again.name == name


@pytest.mark.parametrize("name", ["\0", "a\x1b.jpg", "\udc80.jpg", "\uffff"])
def test_names_that_xml_cannot_hold(name):
    with pytest.raises(DataError, match="XML can hold"):
        file_of([LabelledImage(name, np.ones((1, 1), np.uint8))])


# The file -------------------------------------------------------------------------------------------------------------


def test_a_file_of_two_images():
    labels = np.array([[0, 3, 3], [0, 3, 0]], np.uint8)
    data = file_of([LabelledImage("x/a.jpg", labels), LabelledImage("b.jpg", labels[:1] * 0)])
    root = ET.fromstring(data)
    assert (root.tag, root.findtext("version")) == ("annotations", "1.1")
    assert [label.text for label in root.iterfind("meta/task/labels/label/name")] == list(CLASSES.names)
    first, second = root.iterfind("image")
    assert first.attrib == {"id": "0", "name": "x/a.jpg", "width": "3", "height": "2"}
    assert second.attrib == {"id": "1", "name": "b.jpg", "width": "3", "height": "1"}
    assert not len(second)
    assert [(shape.tag, shape.attrib) for shape in first] == [
        (
            "mask",
            {
                "label": CLASSES.names[2],
                "source": "auto",
                "occluded": "0",
                "rle": "0, 3, 1",
                "left": "1",
                "top": "0",
                "width": "2",
                "height": "2",
                "z_order": "0",
            },
        )
    ]


def test_outlines_but_for_parts_with_holes():
    labels = np.zeros((5, 9), np.uint8)
    labels[:, :5], labels[2, 2], labels[1:4, 7] = 1, 0, 1
    image = ET.fromstring(file_of([LabelledImage("a", labels)], kind="polygon")).find("image")
    holed, whole = image
    assert (holed.tag, holed.get("width"), holed.get("rle")) == ("mask", "5", "0, 12, 1, 12")
    assert (whole.tag, whole.get("points")) == ("polygon", "7,1;8,1;8,4;7,4")


def test_images_are_taken_one_at_a_time():
    taken = []

    def images():
        for i in range(9):
            taken.append(i)
            yield LabelledImage(f"{i}.jpg", np.ones((2, 2), np.uint8))

    chunks = annotations_xml(images(), CLASSES)
    next(chunks)
    assert not taken
    for i in range(9):
        assert next(chunks).count(b"<image ") == 1 and taken == [*range(i + 1)]
    assert list(chunks) == [b"</annotations>\n"]


def test_values_and_names_that_cannot_be():
    with pytest.raises(UnknownClassError, match="up to 4.*got 7"):
        file_of([LabelledImage("a", np.array([[7]], np.uint8))])
    with pytest.raises(UsageError, match="choose another"):
        file_of([], ignore="dog")


# Corrected files ------------------------------------------------------------------------------------------------------


def xml(*shapes, width=4, height=1, before="", after=""):
    image = f'<image id="3" name="a.jpg" width="{width}" height="{height}">{"".join(shapes)}</image>'
    return f"{before}<annotations><version>1.1</version>{image}{after}</annotations>".encode()


def mask(label, rle, left=0, top=0, width=4, height=1, more=""):
    box = f'left="{left}" top="{top}" width="{width}" height="{height}"'
    return f'<mask label="{label}" source="manual" occluded="0" rle="{rle}" {box} {more}></mask>'


def polygon(label, points, more=""):
    return f'<polygon label="{label}" source="manual" occluded="0" points="{points}" {more}/>'


def labels_of(data, **options):
    (image,) = read_xml(data, CLASSES, **options)
    return image.labels.tolist()


def test_later_shapes_lie_over_earlier_ones_and_higher_ones_over_all():
    under, over = mask("cat", "0,3,1"), mask("dog", "1, 3")
    assert labels_of(xml(under, over)) == [[1, 2, 2, 2]]
    assert labels_of(xml(over, under)) == [[1, 1, 1, 2]]
    high = mask("cat", "0,3,1", more='z_order="2"')
    assert labels_of(xml(high, over, mask("dog", "0,1,3", more='z_order="-1"'))) == [[1, 1, 1, 2]]
    assert labels_of(xml(mask("cat", "0,4"), mask("background", "1,2,1"))) == [[1, 0, 0, 1]]


def test_polygons_that_overlap_are_united_and_may_leave_the_image():
    shapes = polygon("dog", "-3.5,-2.00;2.00,-2.00;2.00,9.50;-3.5,9.50"), polygon("dog", "1.00,0;3,0;3,1;1,1")
    assert labels_of(xml(*shapes)) == [[2, 2, 2, 0]]


def test_a_project_with_tags_attributes_and_empty_images():
    data = xml(
        '<tag label="unknown" source="manual"/>',
        mask("dog", "0,4").replace("></mask>", '><attribute name="box">1</attribute></mask>'),
        before='<?xml version="1.0" encoding="utf-8"?>',
        after='<image id="4" name="b.jpg" subset="default" task_id="2" width="1" height="2"></image>',
    )
    one, two = read_xml(data, CLASSES)
    assert (one.name, one.labels.tolist(), two.name, two.labels.tolist()) == ("a.jpg", [[2] * 4], "b.jpg", [[0], [0]])


def test_other_encodings():
    text = xml(mask("Füße", "0,4"), before='<?xml version="1.0" encoding="{}"?>').decode()
    for encoding in ("utf-8", "utf-16", "iso-8859-1", "cp1252"):
        assert labels_of(text.format(encoding).encode(encoding)) == [[4] * 4]


def test_images_come_before_the_file_is_read_to_its_end():
    images = (LabelledImage(f"{i}.jpg", np.full((20, 20), 1 + i % 3, np.uint8)) for i in range(2000))
    data = file_of(images)
    found = read_xml(data[: len(data) // 2], CLASSES)
    names = [next(found).name for _ in range(500)]
    assert names == [f"{i}.jpg" for i in range(500)]
    with pytest.raises(DataError, match="damaged"):
        list(found)


BOMB = '<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged"),
        (b"no xml", "damaged"),
        (xml()[:-5], "damaged"),
        (b'<?xml version="1.0" encoding="utf-99"?>' + xml(), "damaged"),
        (xml("&lol;"), "damaged"),
        (xml(before=BOMB), "document type"),
        (xml(before='<!DOCTYPE a SYSTEM "file:///etc/passwd">'), "document type"),
        (b"<annotation><image/></annotation>", "got <annotation>"),
        (xml(after='<track id="0" label="cat"></track>'), "tracks"),
        (b"<annotations><image/></annotations>", "images with names"),
        (xml(width=0), "image 'a.jpg': expected images of 1 to .*, got 0x1"),
        (xml(width=10**6, height=10**6), "got 1000000x1000000"),
        (xml(width="9" * 5000), "expected width as an integer"),
        (xml(width="wide"), "expected width as an integer, got 'wide'"),
        (xml('<box label="cat" xtl="0" ytl="0" xbr="1" ybr="1"/>'), "got a box of 'cat': draw a mask"),
        (xml(mask("cat", "0,3")), "4 x 1 pixels"),
        (xml(mask("cat", "5,-1")), "4 x 1 pixels"),
        (xml(mask("cat", "0,x")), "numbers with commas"),
        (xml(mask("cat", "")), "numbers with commas"),
        (xml(mask("cat", "0,1.5,2.5")), "numbers with commas"),
        (xml(mask("cat", "0,4", left=1)), "within the image of 4x1"),
        (xml(mask("cat", "0,4", top=-1)), "within the image of 4x1"),
        (xml(mask("cat", "0,0", width=0)), "within the image of 4x1"),
        (xml(mask("cat", "0,4", left="")), "expected left as an integer"),
        (xml(mask("cat", "0,4", more='z_order="top"')), "expected z_order as an integer"),
        (xml(polygon("cat", "0,0;1,1")), "x1, y1, x2"),
        (xml(polygon("cat", "0,0;1,1;2")), "x1, y1, x2"),
        (xml(polygon("cat", "0,0;1,1;2,nan")), "beyond 16777216"),
        (xml(polygon("cat", "0,0;1,1;2,two")), "numbers with commas"),
        (xml("<polygon/>"), "unknown class ''"),
    ],
)
def test_damaged_files_are_refused(data, message):
    with pytest.raises(DataError, match=message):
        list(read_xml(data, CLASSES))


def test_the_nearest_class_is_named():
    with pytest.raises(UnknownClassError, match="image 'a.jpg': unknown class 'dgo': did you mean 'dog'"):
        labels_of(xml(mask("dgo", "0,4")))


def test_hostile_shapes_cost_little():
    bomb = [mask("cat", "0,160000", width=400, height=400)] * 1000
    with pytest.raises(DataError, match="at most 256 times"):
        labels_of(xml(*bomb, width=400, height=400))


@given(st.integers(0, 400), st.binary(max_size=4))
def test_any_damage_is_read_or_refused(place, damage):
    data = file_of([LabelledImage("a.jpg", np.eye(3, dtype=np.uint8))], kind="polygon")
    with contextlib.suppress(DataError):
        assert len(list(read_xml(data[:place] + damage + data[place + len(damage) :], CLASSES))) <= 1


def test_pieces_of_any_size_are_put_together(monkeypatch):
    monkeypatch.setattr(cvat, "_CHUNK_BYTES", 3)
    assert labels_of(xml(mask("dog", "0,4"))) == [[2] * 4]


# Segmentation mask ----------------------------------------------------------------------------------------------------


def test_labelmap():
    classes = ClassTable(("cat", "dog"))
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::", "cat:128,0,0::", "dog:0,128,0::"]
    assert labelmap_txt(classes).splitlines() == lines
    assert labelmap_txt(classes, ignore="void").splitlines() == [*lines, "void:224,224,192::"]
    own = voc_palette()[::-1]
    assert labelmap_txt(classes, own).splitlines()[2] == f"cat:{','.join(map(str, own[1]))}::"


def test_labelmaps_that_cannot_be():
    for name in ("a:b", "a\nb", "#a"):
        with pytest.raises(UsageError, match="labelmap.txt holds no names"):
            labelmap_txt(ClassTable((name,)))
    assert len(labelmap_txt(ClassTable(tuple(map(str, range(254)))), ignore="void").splitlines()) == 257
    for palette, classes in ((None, MANY), (voc_palette()[:4], CLASSES)):
        with pytest.raises(UsageError, match="at most 254 classes"):
            labelmap_txt(classes, palette)
    with pytest.raises(UsageError, match="choose another"):
        labelmap_txt(CLASSES, ignore="background")
