from xml.etree import ElementTree

from service.rendering.figures import svg_file
from service.rendering.series import Band
from service.rendering.svg import Frame, curves_chart

SVG = "{http://www.w3.org/2000/svg}"


def test_a_figure_is_an_image_of_its_own_with_a_legend():
    bands = [
        Band(label=label, x=[0, 10], mean=[0.1, 0.9], low=[0.1, 0.8], high=[0.1, 0.95])
        for label in ("norm=none", "norm=<sync>")
    ]
    chart = curves_chart(bands, Frame(title="accuracy", x_label="step", y_label="accuracy"))
    root = ElementTree.fromstring(svg_file(chart, [band.label for band in bands]))
    assert root.get("height") == str(int(root.find(f"{SVG}svg").get("height")) + 40)
    assert ".s0{color:" in root.find(f"{SVG}style").text
    assert "@media" not in root.find(f"{SVG}style").text  # text would be bright on white
    assert [text.text for text in root.findall(f"{SVG}text")] == ["norm=none", "norm=<sync>"]
