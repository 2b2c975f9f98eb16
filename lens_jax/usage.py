"""What `lens-jax` and its longer commands print where they are asked for help."""

ALL = """\
usage: lens-jax COMMAND [OPTIONS]

Lens in JAX: train and sample the text-to-image system of arXiv 2605.21573.

  prepare openmoji|folder   build a data set from pictograms or from a folder of captioned images
  prepare curated           the best of a prepared data set, as many of each kind
  data build|run|plan|...   clean, caption and pack collections of images, on one machine or many
  precompute CONFIG         store the latents and text features of a data set, to train without the encoders
  train CONFIG              train a run described by a config, or go on with it where it stopped
  rl CONFIG                 learn from rewards of a model's own images, as Lens-Base became Lens
  distill CONFIG            make a model draw in four steps without guidance, as Lens became Lens-Turbo
  plan CONFIG               what a run needs and costs on devices not paid for yet: memory, time, traffic
  sample PROMPT ...         draw images from a run's checkpoint
  rewrite PROMPT ...        what a language model makes of prompts before they are drawn
  prompts make|check|subset write a set of prompts with rubrics to train and judge on, and look into one
  convert to-jax|to-torch   convert the released checkpoints, or a run, there and back; pack: a run as one file
  plot RUN ...              draw the curves of runs: losses, norms, speed, memory
  evaluate                  measure how often sampled images show what their prompts ask for
  claims RUN ...            what runs of rl changed on the prompts held out from them, as a table
  bench train|sample|...    measure the speed of a training step, an image, or one of its parts
  info PATH                 say what a checkpoint, a release or a data set holds

Every command answers --help. The small model that comes with the package draws at once; a first run of one's own takes
about ten minutes on two cores:

  lens-jax sample "three mushrooms" "a fox to the left of a house on a pink background"
  lens-jax prepare openmoji
  lens-jax train quickstart
  lens-jax sample "red apple" "cat on the left, automobile on the right" --checkpoint runs/quickstart
"""

TRAIN = """\
usage: lens-jax train CONFIG [OPTIONS]

CONFIG is a python file that defines `config`, or one that comes with the package:
  {configs}

Every field is an option: lens-jax train quickstart --help lists them.
--init-from BASE --lora.rank 64 trains an adapter (LoRA) beside BASE, a run or a release.
A run whose folder exists goes on from its newest checkpoint."""

RL = """\
usage: lens-jax rl CONFIG [--algorithm nft|grpo] [OPTIONS]

Learn from rewards of a model's own images: draw groups of images of a prompt, judge them, update.
CONFIG is a python file that defines `config`, or one that comes with the package:
  {configs}

Every field is an option: lens-jax rl rl_lens --help lists them. docs/rl.md has more.
A run whose folder exists goes on from its newest checkpoint, and asks for no reward twice."""

DISTILL = """\
usage: lens-jax distill CONFIG [--init-from TEACHER] [OPTIONS]

Make a student of TEACHER (a run, a packed model or a release) that draws in four steps, no guidance.
CONFIG is a python file that defines `config`, or one that comes with the package:
  {configs}

Every field is an option: lens-jax distill distill_small --help lists them. docs/distillation.md has more.
--teacher-lora RUN takes the adapter of lens-jax rl; --no-gan needs captions alone.
A run whose folder exists goes on from its newest checkpoint."""

BENCH = """\
usage: lens-jax bench WHAT [OPTIONS]

  suite      all that follows and more in nine minutes, most valuable first, for a GPU that is lent for a while
  train      one training step, beside a plain matrix product, and beside that of an adapter (--lora)
  data       batches of images: read, decoded, resized, cropped
  engine     the data engine's first stages, beside a plain pool of processes over the same functions
  clean      decoding an image and its classical scores, beside Pillow and numpy
  filters    no speed: precision and recall of the cleaning's classical filters on constructed images
  dedup      near duplicates among vectors, beside all pairs
  copies     at which cosine an embedding tells copies of images from other images
  captions   captions of a server that answers at once, beside the SDK alone
  synthetic  images of rendered text, drawn and encoded
  languages  no speed: what the small text encoder carries over to languages that were never trained on
  sample     token ids to an image, end to end and by its parts
  student    prompts to images by a distilled model, beside its teacher
  denoiser   one forward pass of the denoiser
  attention  a kernel of joint attention, beside a plain softmax
  text       the features of a prompt by GPT-OSS
  decode     latents to an image by the autoencoder, or back
  convert    a release's denoiser to our layout, beside cp of the same folder

All but data, engine, clean, filters, dedup, copies, captions, synthetic, languages, student, convert and attention
take --size lens|toy|tiny, with random weights. train, data, denoiser, text and decode take --against torch: the same in
eager PyTorch, its DataLoader, transformers and diffusers, in turn. Each answers --help.
"""
