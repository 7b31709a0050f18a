"`make picture`: a synthetic section that the demo has not seen, and its salt as the demo's networks see it."

from pathlib import Path

from saltlib.inference import load_networks, predict_mean
from saltlib.new_tiles import find_members
from saltlib.plots import plot_section
from saltlib.synthetic import lay_tiles, make_section, section_tiles

SECTION = [2018, 10]  # the demo's ten are [2018, 0] to [2018, 9]
image, mask = make_section(SECTION)
tiles, _ = section_tiles(SECTION)  # each stretched by itself, as those that the networks learned from
networks = load_networks("compact", [member.path for member in find_members("outputs/demo")])
probs = lay_tiles(predict_mean(networks, tiles, "compact"), image.shape[1] // tiles.shape[2])
plot_section(image, mask, probs).savefig(Path(__file__).with_suffix(".jpg"), pil_kwargs={"quality": 80})
