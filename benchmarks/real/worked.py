"""Worked answers to 32 stories of `tasks.word_problems`, written by hand: what a cold start learns from."""

from datasets import Dataset

from nbhelpers import tasks

SEED = 2100  # of the questions; a run's own seed makes others
TEXTS = {  # the name of a story -> its first question of that seed, worked out
    "egg_trays": "5 trays hold 5 * 20 = 100 eggs. 4 of them crack, so 100 - 4 = 96 are still good.",
    "pairs_on_sale": "5% of $88 is 88 * 0.05 = $4.40, so a pair costs 88 - 4.40 = $83.60. Six pairs cost 6 * 83.60 = "
    "$501.60.",
    "train_ride": "From 6:05 to 9:05 it is 3 hours, which are 3 * 60 = 180 minutes. From 9:05 to 9:29 it is 24 "
    "minutes. Together 180 + 24 = 204 minutes.",
    "jam_jars": "The apricots cost 10 * 2.20 = $22. The sugar costs 3 * 1.60 = $4.80. Together that is 22 + 4.80 = "
    "$26.80. One of 8 jars costs 26.80 / 8 = $3.35.",
    "left_over": "Together they have 59 + 35 = 94 bulbs. 15 boxes of 6 hold 15 * 6 = 90, and 16 would need 96. So 94 "
    "- 90 = 4 are left over.",
    "vegetable_patch": "There are 4 * 15 = 60 leek plants. With the 19 pumpkin plants that makes 60 + 19 = 79.",
    "two_legs": "On foot it is 4 * 3 = 12 kilometres. By bicycle it is 2 * 21 = 42 kilometres. Altogether 12 + 42 = "
    "54.",
    "filling_a_pool": "The volume is 18 * 4 * 3 = 216 cubic metres, which are 216 * 1000 = 216000 litres. That takes "
    "216000 / 100 = 2160 minutes. An hour has 60 of them, so it is 2160 / 60 = 36 hours.",
    "time_in_motion": "From 9:00 to 17:55 it is 8 hours and 55 minutes, which are 8 * 60 + 55 = 535 minutes. The "
    "stops take 11 * 7 = 77 minutes. So it moves for 535 - 77 = 458 minutes.",
    "shared_marbles": "After 8 are given away, 110 - 8 = 102 stickers are left. Shared among 6 that is 102 / 6 = 17.",
    "leaking_tank": "The tank lacks 214 - 70 = 144 litres. Each minute it gains 13 - 4 = 9 litres. So it takes 144 / "
    "9 = 16 minutes.",
    "cinema_change": "The tickets cost 5 * 5.80 = $29. The change is 50 - 29 = $21, which is $21.00.",
    "ferry_takings": "The cars bring 87 * 29 = $2523. The lorries bring 4 * 52 = $208. The people bring 102 * 6.50 = "
    "$663. Altogether 2523 + 208 + 663 = $3394, which is $3394.00.",
    "rain_barrel": "There are 2831 - 50 = 2781 litres left. The people take 4 * 17 = 68 litres a day, with the "
    "garden it is 68 + 35 = 103. The water lasts for 2781 / 103 = 27 days.",
    "free_seats": "There are 13 + 12 = 25 passengers now. So 66 - 25 = 41 seats are free.",
    "stamp_album": "Aigerim brings 12 * 20 = 240 fossils. A quarter of them is 240 / 4 = 60, so 240 - 60 = 180 stay. "
    "With 40 others it is 180 + 40 = 220.",
    "three_people": "Giulia photographs 3 * 68 = 204 birds. Paloma photographs 204 - 14 = 190. All three together: "
    "68 + 204 + 190 = 462.",
    "thermometer": "In 4 hours it gets 4 * 4 = 16 degrees colder, so it is 21 - 16 = 5 degrees. Then it gets 5 "
    "degrees warmer: 5 + 5 = 10.",
    "voucher": "In the sale the boots cost 40.60 - 6 = $34.60. With the voucher it is 34.60 - 10 = $24.60.",
    "gives_half": "Half of 80 is 80 / 2 = 40, so 40 badges stay. With 23 new ones Giulia has 40 + 23 = 63.",
    "coin_jar": "26 coins of 50 cents are 26 * 50 = 1300 cents. 55 coins of 5 cents are 55 * 5 = 275 cents. Together "
    "that is 1300 + 275 = 1575 cents, which are $15.75.",
    "trip_fund": "The pupils bring 23 * 34 = $782. The entrance fees are 23 * 6 = $138. After the coach and the fees "
    "there remain 782 - 597 - 138 = $47.",
    "shelves_from_board": "6.65 metres are 665 centimetres. That makes 665 / 35 = 19 pieces. Without the 2 crooked "
    "ones 19 - 2 = 17 are straight.",
    "mothers_age": "The teacher is 4 * 7 = 28 years old now. Sang-woo is 11 in 11 - 7 = 4 years. Then the teacher is "
    "28 + 4 = 32.",
    "purse_backwards": "Go backwards. Before the grandmother's $30 there were 49 - 30 = $19. Before the torch there "
    "was twice as much, 19 * 2 = $38. Before the book it was 38 + 25 = $63. Before the tent it was 63 * 2 = $126. "
    "Before the tram it was 126 + 8 = $134.",
    "last_game": "After 6 games there are 6 * 29 = 174 points. An average of 30 in 7 games takes 7 * 30 = 210 "
    "points. So the last game has to bring 210 - 174 = 36.",
    "two_carpets": "The rooms have 5 * 6 = 30 and 7 * 4 = 28 square metres, together 30 + 28 = 58. The flooring "
    "costs 58 * 47 = $2726. With delivery it is 2726 + 70 = $2796.",
    "two_syrups": "In the first liquid there are 19 * 0.45 = 8.55 litres of vinegar, in the second 18 * 0.50 = 9 "
    "litres. The mixture contains 8.55 + 9 = 17.55 litres.",
    "older_sister": "Beatriz is 11 + 4 = 15 years old now. In 5 years Beatriz will be 15 + 5 = 20.",
    "tiles_missing": "The terrace has 8 * 5 = 40 square metres. It takes 40 * 25 = 1000 tiles. 559 are there, so "
    "1000 - 559 = 441 are missing.",
    "weeks_to_goal": "The laptop costs 492 - 50 = $442. Vikram still needs 442 - 99 = $343. A week brings 7 * 12 = "
    "$84, and 84 - 35 = $49 are saved. So it takes 343 / 49 = 7 weeks.",
    "pottery_stall": "Jadwiga sells 63 - 5 = 58 baskets and gets 58 * 10 = $580. The costs are 290 + 25 = $315. The "
    "profit is 580 - 315 = $265.",
}  # fmt: skip


def rows(system_prompt: str | None) -> Dataset:
    """The 32 questions with that system prompt: `prompt`, `answer`, and `completion` in the form of the task."""
    asked = tasks.word_problems(len(TEXTS), 1, seed=SEED, system_prompt=system_prompt).train
    texts = (tasks.worked(TEXTS[row["template"]], row["answer"]) for row in asked)
    return Dataset.from_list([{**row, "completion": text} for row, text in zip(asked, texts, strict=True)])
