"""star_fast in ten lines; examples/notebook.py says more. Needs what scripts/quickstart.sh leaves: runs/digits."""

import star_fast

model = star_fast.load("runs/digits")  # or load("c2i_B_256.pt", tokenizer="vq_ds16_c2i.pt", class_names="imagenet")
images = model.sample(["3", "7"], n=8, guidance=2.0, seed=0)  # eight of each; images[0] is a PIL image
images.save("digits.png")
codes = model.codes(images)  # (16, 49) int64: the tokenizer's view of them
again = model.decode(codes)  # and back
features = model.features(codes)  # (16, 49, 96): what the middle block knows at each position
config = star_fast.run_config("tiny", {"data.codes": "data/digits", "train.max_steps": 200})
run = star_fast.train(config, "runs/short")  # ST-AR, in this process
print(star_fast.load(run))
