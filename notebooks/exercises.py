# %% [markdown] tags=["taught"]
# ## Your turn
#
# Each of these is a run of its own. Give it its own folder (`OUT = "runs/mine"` in section 2), make the change, restart
# the kernel and run all cells: the model has to be loaded anew, for this one has learned already.
#
# **1.** Train with `reward_funcs=[in_form]` (section 9). Which curve moves, which does not, and why?
#
# <details><summary>Answer</summary>
#
# `in_form` rises towards 0.3, and *format* with it. Nothing pays for a right result any more, so in section 10 accuracy
# moves by chance alone. Once all answers to a question keep the form, they all get the same reward: *no signal* comes
# close to 100 %, and the run ends by itself and says so.
#
# </details>
#
# **2.** Let `correct` pay 0.5 for an answer within 10 % of the right one (section 6), and try it with `rewards.check`.
# What does it do to the share of groups without signal?
#
# <details><summary>Answer</summary>
#
# ```python
# def near(text, gold):
#     """Whether the number that is read of the text is within 10 % of the right one."""
#     found, wanted = rewards.number_of(rewards.read(text) or ""), rewards.number_of(gold)
#     return None not in (found, wanted) and abs(found - wanted) <= abs(wanted) / 10
#
#
# def correct(completions, answer, **_):
#     """1 for the right result, 0.5 for one that is near, else 0."""
#     texts = [rewards.text_of(completion) for completion in completions]
#     return [
#         1.0 if rewards.right(text, gold, preset.tags) else 0.5 * near(text, gold)
#         for text, gold in zip(texts, answer, strict=True)
#     ]
# ```
#
# It falls: a group that is all wrong has a signal as soon as one answer is near and another is not. The price is that
# a slip in the last step, 98 instead of 100, is now paid as something half right.
#
# </details>

# %% [markdown] tags=["thinks"]
# ## Your turn
#
# Each of these is a run of its own. Give it its own folder (`OUT = "runs/mine"` in section 2), make the change, restart
# the kernel and run all cells: the model has to be loaded anew, for this one has learned already.
#
# **1.** Train without `brief` (in `reward_funcs`, section 9). Do the answers get shorter all the same? Why could they?
#
# <details><summary>Answer</summary>
#
# They may, as long as many are cut off: a thought without an end gets nothing, so within a group the shorter answers
# are those with a reward, and become more likely. Where hardly any answer is cut off, nothing pays for fewer words.
#
# </details>
#
# **2.** Let `brief` pay wrong answers too (section 6), and try it with `rewards.check`. What would a model learn?
#
# <details><summary>Answer</summary>
#
# ```python
# def brief(completion_ids, **_):
#     """Up to 0.3 for any answer, the more the fewer tokens it takes."""
#     return [0.3 * max(0, 1 - len(ids) / longest) for ids in completion_ids]
#
#
# rewards.check([brief], task, form=preset.tags.frame)
# ```
#
# To say nothing: the table warns that `brief` can be gamed, because an empty answer gets all 0.3.
#
# </details>

# %% [markdown]
# **3.** Your own questions: make a file with the columns question and answer, and set `DATA` to its name (section 4).
# Which rows are left out?
#
# <details><summary>Answer</summary>
#
# ```python
# rows = ["question,answer", "How many legs have 3 cats?,12", "How many legs have 2 birds?,4"]
# rows += ["How many legs have 2 birds?,4", "How many wings have 5 birds?,", "How many legs have 4 spiders?,32"]
# with open("my_questions.csv", "w") as file:
#     file.write("\n".join(rows))
# ```
#
# Line 4, because its question occurs twice, and line 5, which has no answer. Three are left, one of them held out, and
# a step says that it takes two questions instead of more. It runs; to learn something it takes hundreds.
#
# </details>
