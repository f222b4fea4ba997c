# %% [markdown] tags=["taught"]
# # {title}: a reasoning model by GRPO
#
# {badges}
#
# In this notebook {title} practises thinking before it answers, by **GRPO**, the reinforcement-learning method behind
# DeepSeek-R1: it writes several answers to a question, a few lines of Python say which are good, and those become more
# likely. Nobody shows it how to reason.
#
# Run the cells from top to bottom. Before anything is downloaded you see whether the model fits your card; while it
# trains you see a live curve; at the end it gets the same questions as before. You can stop at any time and keep what
# was learned. After a disconnect, run the cells again: training resumes where it left off.
#
# The model is `{hub_id}`. {access}{more}
#
# You need a GPU. On Colab: *Runtime, Change runtime type, T4 GPU*. On Kaggle: *Settings, Accelerator, GPU T4 x2*, and
# there *Internet on* as well.

# %% [markdown] tags=["thinks"]
# # {title}: right in fewer words by GRPO
#
# {badges}
#
# {title} reasons already: {origin} Such thoughts are long, and one that does not end within the tokens that it gets is
# cut off before its answer. In this notebook the model practises being right in fewer words, by **GRPO**, the
# reinforcement-learning method behind DeepSeek-R1: it writes several answers to a question, a few lines of Python say
# which are good, and those become more likely. Nobody shows it a shorter thought.
#
# Run the cells from top to bottom. Before anything is downloaded you see whether the model fits your card; while it
# trains you see a live curve; at the end it gets the same questions as before. You can stop at any time and keep what
# was learned. After a disconnect, run the cells again: training resumes where it left off.
#
# The model is `{hub_id}`. {access}{more}
#
# You need a GPU. On Colab: *Runtime, Change runtime type, T4 GPU*. On Kaggle: *Settings, Accelerator, GPU T4 x2*, and
# there *Internet on* as well.

# %% [markdown]
# ## 1 · Install
#
# The session's own torch and numpy stay as they are; only what is missing is added. On your own machine this cell
# installs nothing, it only checks.

# %% tags=["install"]
# nbhelpers is taken from near this notebook, else, on Colab and Kaggle, from the network; their torch and numpy stay.
import os
import subprocess
import sys
from glob import glob
from importlib import import_module, util

REPOSITORY = "{repository}"  # in a fork: your own
RELEASE, COMMIT = "{release}", "{commit}"  # a tag can be moved, its commit cannot; empty: no release yet
hosted = "COLAB_RELEASE_TAG" in os.environ or "KAGGLE_KERNEL_RUN_TYPE" in os.environ
sys.path += map(os.path.abspath, [".", "..", "../..", *glob("/kaggle/input/**/", recursive=True)])  # its folder, or
sources = [file for at in sys.path for kind in ("whl", "zip") for file in glob(f"{at}/nbhelpers*.{kind}")]
sources, why = sources + [f"git+{REPOSITORY}@{COMMIT or 'main'}"] * hosted, "none near this notebook"
for source in sources:
    if not util.find_spec("nbhelpers"):
        print(f"nbhelpers {RELEASE or '(nothing is released yet)'} from {source}")
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", source]
        said = subprocess.run(pip, capture_output=True, text=True).stderr
        why = (said.partition("fatal: ")[2] or said.partition("ERROR: ")[2]).partition("\n")[0]
if not util.find_spec("nbhelpers"):
    raise type("Stop", (Exception,), {"_render_traceback_": lambda stop: [str(stop)]})(
        f"No nbhelpers here: {why}. Put its folder, wheel or zip beside this notebook (Kaggle: as a dataset), or write "
        "an address in reach into REPOSITORY (Kaggle: Internet on), or %pip install it yourself; then run it again."
    )
import_module("nbhelpers.install").run()

# %% [markdown]
# ## 2 · Will it fit?
#
# The next cell sets the model, and how long it trains. Fewer `STEPS` for a first look, more for a longer run.
# Checkpoints go to `OUT`. The two cells behind it see to it that they outlive the session, on Colab and on Kaggle.

# %% tags=["parameters"]
PRESET = "{preset}"
STEPS = None  # None: as many as the preset says; 20 for a first look
SEED = 0
OUT = f"runs/{PRESET}"  # checkpoints and the result

# %% tags=["drive"]
from nbhelpers import session

DRIVE = False  # True, on Colab: keep OUT on your Google Drive; Colab asks whether it may
OUT = session.drive(OUT, mount=DRIVE)

# %% tags=["kaggle"]
OUT = session.kaggle(OUT)

# %% [markdown]
# A **preset** is the model together with the numbers that suit a card: how many bits, how large a LoRA, how many
# answers and how long. The bar below counts what they take, part by part, once for the half of a step that generates
# and once for the half that trains; without a GPU, as on a T4. If it does not fit, it says what would.
#
# Some words in it: `nf4` means that a weight takes 4 bits instead of 16; `dynamic` keeps in 16 bits the layers that 4
# bits would hurt most. A *LoRA* or *adapter* is the small part that is trained (section 3), *optimizer* what its
# training rule, Adam, remembers. The *KV cache* is what generating remembers of the text so far, the *logits* are the
# scores of all possible next words. *Kept for backward* spares computing things twice, and takes what room is left.
# Lengths are in **tokens**, the pieces of text that a model reads and writes: a short word, a part of a long one, a
# digit.

# %% tags=["preset"]
from nbhelpers import evaluate, export, grpo, host, hub, loader, memory, panel, presets, replay, rewards, tasks

preset = presets.get(PRESET).on_card(host.card_gb())
hub.login(preset)  # asks for a token only if the model is gated
host.report(preset)
memory.sliders(preset)  # the plan; move a slider and it follows

# %% [markdown]
# ## 3 · Load
#
# The weights arrive tensor by tensor and are packed into 4 bits on the way, so that neither the host's memory nor the
# card ever holds the 16-bit model. They stay frozen. What is trained is a **LoRA**: two thin matrices beside every
# linear layer, together around a percent of the model.

# %%
import torch

replay.instead_of(preset)  # only without a GPU: a recorded run, marked as one, and a stop
torch.manual_seed(SEED)  # the first numbers of a LoRA are drawn
model, tokenizer = loader.load(preset)

# %% [markdown]
# ## 4 · The task
#
# GSM8K: word problems of a few steps whose answer is a number. GRPO uses only the question and the final answer, and
# **no solution to copy**: the model has to find out how to get there. A good task is one that the model sometimes gets
# right. What it always or never gets right teaches nothing, as section 7 shows.
#
# A fifth of the questions ask which of two decimals is bigger, so what is asked at the end is practised here too.
# The test questions are word problems alone. (`tasks.word_problems()` makes some without a download.)

# %% tags=["task"]
DATA = ""  # your own questions instead: a .csv, .jsonl or .parquet file with the columns question and answer
asked_in = dict(max_prompt_length=preset.max_prompt_length, system_prompt=preset.system_prompt)
if DATA:
    task = tasks.from_file(DATA, tokenizer=tokenizer, **asked_in)
else:
    problems = tasks.gsm8k(tokenizer, source=preset.dataset, **asked_in)
    decimals = tasks.decimals(system_prompt=preset.system_prompt)
    task = tasks.mix(problems, decimals, shares=(0.8, 0.2), seed=SEED)
print(task)

# %% [markdown]
# **What the model reads**, token by token, here and in every test; how long the questions are; and which rows were left
# out, with their lines and the reasons. With a file of your own, look here first.

# %% tags=["doctor"]
task.preview(tokenizer, n=1)

# %% [markdown]
# ## 5 · Before
#
# The famous question, in three wordings, two more that others ask at this point, and then held-out problems. One lucky
# answer proves little, so the share of right ones comes with the interval in which the true share lies 19 times out of
# 20. More rows make it narrower; 100 leave about ten points to each side.
#
# *Accuracy* counts answers that are right in whatever form they come, as a person would read them. *Format* counts
# answers whose tags are as they should be, right or wrong. They are two numbers because they are two things: if only
# what stands in tags counted, a model that learned nothing but the tags would look like one that learned arithmetic.

# %% tags=["before"]
HELD_OUT = 100
longest = preset.max_completion_length
asked = dict(tags=preset.tags, max_new_tokens=longest)  # the form, and how many tokens an answer may take
before = evaluate.ask(model, tokenizer, list(tasks.PROBE_ANSWERS), **preset.asking)
print(f"{before[0].question}\n\n{before[0].completion}\n")
score_before = evaluate.accuracy(model, tokenizer, task.test, n=HELD_OUT, **asked)
print(score_before)

# %% [markdown] tags=["taught"]
# ## 6 · Rewards
#
# A reward function gets all answers of a step and returns a number for each. These two are the whole teaching: one
# looks at the result, one at the form. Neither looks at the reasoning itself, which is why the model is free to find
# its own.
#
# Both pay in steps, so that there is something to gain from wherever a model begins: a right result pays most of its
# reward in any form at all, and the form pays tag by tag. If only a right result in the exact form were paid, a model
# that never writes that form by itself would never hear that it was right.
#
# The form counts for little on purpose. If it paid more than the result, the quickest way to a high reward would be
# neat tags around any number at all.


# %% tags=["taught"]
def correct(completions, answer, **_):
    """1 for the right result between the answer tags, 0.8 for it in any other form, else 0."""
    texts = [rewards.text_of(completion) for completion in completions]
    return [
        1.0 if rewards.is_correct(text, gold, preset.tags) else 0.8 * rewards.right(text, gold, preset.tags)
        for text, gold in zip(texts, answer, strict=True)
    ]


def in_form(prompts, completions, **_):
    """Up to 0.3: 0.05 for each tag, 0.1 for the exact form; nothing for dots, or a thought that is copied."""
    texts = [rewards.text_of(completion) for completion in completions]
    return [0.3 * rewards.form(text, preset.tags, prompt=prompt) for text, prompt in zip(texts, prompts, strict=True)]


# %% [markdown] tags=["thinks"]
# ## 6 · Rewards
#
# A reward function gets all answers of a step and returns a number for each. These three are the whole teaching:
# `correct` looks at the result, `in_form` at whether a thought was closed and an answer follows, `brief` at the length.
# None of them looks at the reasoning itself, which is why the model is free to find what can be left out.
#
# A thought that was cut off has no answer yet, whatever number happens to stand last in it. It gets nothing.
#
# `brief` pays right answers alone, and little. If it paid all of them, the quickest way to a high reward would be any
# number without a thought. So a right answer in many words is still worth far more than a wrong one in few.


# %% tags=["thinks"]
def correct(completions, answer, **_):
    """1 for the right result behind the thought, else 0."""
    texts = [rewards.text_of(completion) for completion in completions]
    return [float(rewards.right(text, gold, preset.tags)) for text, gold in zip(texts, answer, strict=True)]


def in_form(prompts, completions, **_):
    """Up to 0.3: 0.1 a tag, 0.1 for a closed thought and an answer; nothing for dots, or a thought that is copied."""
    texts = [rewards.text_of(completion) for completion in completions]
    return [0.3 * rewards.form(text, preset.tags, prompt=prompt) for text, prompt in zip(texts, prompts, strict=True)]


def brief(completions, completion_ids, answer, **_):
    """Up to 0.3 for a right answer, the more the fewer it takes of the tokens that are allowed."""
    unused = [max(0, 1 - len(ids) / longest) for ids in completion_ids]
    return [0.3 * good * share for good, share in zip(correct(completions, answer), unused, strict=True)]


# %% [markdown]
# **Try a reward before you train on it.** The table gives each function right answers, wrong ones, empty ones and ones
# that try to cheat. A reward with a hole in it is a hole that the model will find.

# %%
rewards.check([correct, in_form], task, form=preset.tags.frame)

# %%
# Type an answer of your own: at every key you see what each reward pays for it, and what is read of it.
rewards.playground([correct, in_form], task, tags=preset.tags)

# %% [markdown]
# ## 7 · One step of GRPO, looked at closely
#
# Every step begins like this: the model answers the same question several times. It draws each token at random with the
# probability that it gives it (*temperature* 1), so the answers differ. Each gets its reward, and each is compared with
# **the average of its own group**:
#
# $$ A_i = \frac{r_i - \text{mean}(r)}{\text{std}(r)} $$
#
# Above average (a positive *advantage*) an answer's tokens are made more likely, below average less likely. No second
# network has to guess how good a question's answers usually are: the group itself says so. If all rewards are equal,
# every advantage is 0 and the group teaches nothing.
#
# **Is there anything to learn from?** Better to know before a night is spent on it. So eight questions are answered as
# in the first two steps: the most telling group is shown answer by answer, and the table below it says how many were
# right, in form and cut off, how many of the groups would teach something, and behind the arrow what to do.

# %% tags=["signal"]
size = preset.num_generations
signal = evaluate.check_signal(model, tokenizer, task, [correct, in_form], num_generations=size, **asked)
group, scores = signal.rows[signal.widest], torch.tensor(signal.rewards[signal.widest])
advantages = grpo.group_advantages(scores, num_generations=size)
print(group[0].question)
for row, score, advantage in zip(group, scores, advantages, strict=True):
    print(f"reward {score:.2f}  advantage {advantage:+.2f}  … {row.completion[-60:]!r}")
signal

# %% [markdown]
# ## 8 · Settings
#
# Those of TRL, the library whose trainer this one builds on, spelled out. A step takes `questions_per_step` questions
# and answers each of them `num_generations` times; how many answers go through the card at once, the trainer finds out
# by itself. The learning rate is small because a reward is a noisy teacher. With `beta=0` nothing pulls the model back
# to where it was; if the answers turn into gibberish, try 0.04.

# %%
from nbhelpers import LeanGRPOConfig, LeanGRPOTrainer, StopWhen

args = LeanGRPOConfig(
    output_dir=OUT,
    max_steps=STEPS or preset.max_steps,
    num_generations=preset.num_generations,  # answers to a question: the group
    # fewer are faster and noisier
    per_device_train_batch_size=task.per_step(preset.questions_per_step) * preset.num_generations,
    gradient_accumulation_steps=1,
    max_completion_length=preset.max_completion_length,
    temperature=1.0,
    learning_rate=preset.learning_rate,
    lr_scheduler_type="constant_with_warmup",
    warmup_steps=10,
    max_grad_norm=0.2,  # a longer gradient is cut to this length
    beta=0.0,
    dynamic_sampling=1,  # questions whose answers all got the same reward are replaced, once
    optim="adamw_8bit",  # Adam, with its memory in 8 bits
    save_steps=20,  # a checkpoint every 20 steps, the newest two are kept
    seed=SEED,
)

# %% [markdown]
# ## 9 · Train
#
# The trainer is TRL's, with three parts replaced: a fast decoder writes the answers directly from the weights being
# trained, the update runs within the card's memory, and what was learned is never lost.

# %%
live = panel.Live(probes=before)  # the questions of section 5 are asked again every 20 steps
trainer = LeanGRPOTrainer(
    model,
    reward_funcs=[correct, in_form],
    args=args,
    train_dataset=task.train,
    processing_class=tokenizer,
    engine="auto",
    tags=preset.tags,
    callbacks=[live],
    stop_when=StopWhen(),  # ends a run that learns nothing, and says why
)

# %% [markdown] tags=["taught"]
# **What to look for.** Single steps are noisy: their questions are few, and some are harder than others.
# Look at the smoothed line over tens of steps.
#
# - `in_form` usually moves first: it is easy, and it is rewarded at once. `correct` follows later and more slowly, if
#   it does.
# - *cut off* counts answers that reached `max_completion_length` before they ended. They cannot be right. If most are
#   cut off, allow more tokens.
# - *no signal* counts groups whose answers all got the same reward. They are replaced once by other questions; near
#   100 % nothing is learned, and after ten such steps the run ends by itself and says what to change.

# %% [markdown] tags=["thinks"]
# **What to look for.** Single steps are noisy: their questions are few, and some are harder than others.
# Look at the smoothed line over tens of steps.
#
# - *tokens an answer* is the curve that should fall: `brief` pays for it. If `correct` falls with it, the model leaves
#   out thoughts that it needs: let `brief` pay less.
# - *cut off* counts answers that reached `max_completion_length` before they ended. They cannot be right. It falls as
#   thoughts get shorter, and `correct` and `in_form` rise by as much; if most are cut off from the start, allow more
#   tokens.
# - *no signal* counts groups whose answers all got the same reward. Here they are few, for two right answers are
#   hardly ever equally long; after ten steps of nothing else the run ends by itself and says what to change.

# %% [markdown]
# **When it stays flat:** open a few answers in the panel. All wrong? The task is too hard for this model, or the reward
# does not read its answers. All right? Too easy. Some right and still flat after a hundred steps? Raise the learning
# rate threefold.
#
# **How long it takes** depends mostly on the card. After the first few steps the panel's *left* says it for yours. You
# need not wait: stop the cell when you have seen enough, and go on below. Run it again, even in a new session with the
# same files, and training resumes from the newest checkpoint.
#
# **Closed the tab?** The run goes on without it. Run `live` in a new cell, and the panel is there again.

# %% tags=["train"]
result = trainer.train(resume_from_checkpoint="auto")

# %% [markdown]
# ## 10 · After
#
# The same questions, the same system prompt, the same decoding. Only the weights differ.

# %%
after = evaluate.ask_again(model, tokenizer, before)
panel.before_after(before, after, list(tasks.PROBE_ANSWERS.values()))

# %% [markdown]
# And the same held-out problems, which the training never saw. Compare the intervals, not only the two numbers: if they
# overlap widely, the run was too short, or the questions too few, to tell. *Gained* and *lost* count single questions;
# chance alone moves some of them in each direction.

# %% tags=["after"]
score_after = evaluate.accuracy(model, tokenizer, task.test, n=HELD_OUT, **asked)
print(f"before: {score_before}\nafter:  {score_after}\n{evaluate.paired(score_before, score_after)}")

# %% [markdown]
# ## 11 · Ask it anything
#
# The same model answers twice, without its adapter, which is the model before the training, and with it. Words that
# only one of the two has are marked; the last line compares the final answers alone. Write a question of your own and
# run the cell again.

# %% tags=["chat"]
QUESTION = "A baker fills 3 trays with 12 rolls each and sells 20 of them. How many are left?"
panel.before_after(*evaluate.with_and_without(model, tokenizer, [QUESTION], **preset.asking))

# %% [markdown]
# ## 12 · Keep it
#
# What was trained is the adapter, a small file that works only with the model it was trained on. The first cell keeps
# it, and says what the other forms take. Name those that you want in `WRITE`, and run these three cells: *merged* is
# the whole model in 16 bits, for transformers and vLLM; *q8_0* and *q4_k_m* are GGUF files in 8 and in about 5 bits,
# for llama.cpp, Ollama and LM Studio.

# %% tags=["keep"]
WRITE = []  # or ["merged", "q8_0", "q4_k_m"], or some of them
reasoner = export.save(model, tokenizer, f"{OUT}/reasoner")
print(reasoner, export.sizes(preset, reasoner), sep="\n")

# %% tags=["merged"]
if "merged" in WRITE:
    export.merged(model, tokenizer, f"{OUT}/reasoner-16bit")
else:
    print("merged not written: it is not in WRITE")

# %% tags=["gguf"]
for kind in ("q8_0", "q4_k_m"):
    if kind in WRITE:
        print(export.why_not(kind) or export.gguf(model, tokenizer, f"{OUT}/reasoner-{kind}.gguf", kind))
    else:
        print(f"{kind} not written: it is not in WRITE")

# %% [markdown]
# **On the hub** others can load it, or you on another machine. You need a token with write access, under the name
# `HF_TOKEN` among the secrets of Colab or Kaggle.

# %% tags=["push"]
HUB = ""  # "your-name/my-reasoner": upload the adapter there; the repository is private until you change that
if HUB:
    hub.login(preset, to_push=True)
    print(export.push(reasoner, HUB))
else:
    print("not uploaded: HUB is empty")

# %% [markdown]
# **Use it tomorrow.** In a new session run the cells of sections 1 and 2, and then this one. For the merged model it is
# `reasoner-16bit` instead of `reasoner`.

# %% tags=["tomorrow"]
TOMORROW = False  # True in a new session, where nothing else is on the card
if TOMORROW:
    kept, its_tokenizer = loader.load(f"{OUT}/reasoner")  # the adapter, on its model
    print(evaluate.ask(kept, its_tokenizer, ["Which is bigger, 9.11 or 9.9?"], **preset.asking)[0].completion)
else:
    print("for a new session: TOMORROW is False")
