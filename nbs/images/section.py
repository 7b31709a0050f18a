"`make picture`: a synthetic section that the demo has not seen, and its salt as the demo's networks see it."

from pathlib import Path

from saltlib.inference import load_networks, predict_mean
from saltlib.new_tiles import find_members
from saltlib.plots import plot_section
from saltlib.synthetic import cut_tiles, make_section

image, mask = make_section([2018, 10])  # the demo's ten are [2018, 0] to [2018, 9]
members = find_members("outputs/demo")
networks = load_networks("compact", [member.path for member in members])
probs = predict_mean(networks, cut_tiles(image), "compact")  # [40,101,101]
probs = probs.reshape(5, 8, 101, 101).swapaxes(1, 2).reshape(image.shape)  # the tiles put together again
plot_section(image, mask, probs).savefig(Path(__file__).with_suffix(".jpg"), pil_kwargs={"quality": 80})
