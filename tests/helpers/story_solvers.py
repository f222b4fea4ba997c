"""A second solution of every story in tasks.problems, from the numbers that stand in the question and nothing else.

A solver gets them as fractions in the order of the text. If one does not agree with the story's own answer, either the
arithmetic is wrong or the text does not say all that is needed.
"""

from fractions import Fraction as F
from math import ceil

SOLVERS = {
    # two steps
    "egg_trays": lambda trays, each, cracked: sum([each] * int(trays)) - cracked,
    "free_seats": lambda seats, riding, more: seats - (riding + more),
    "cinema_change": lambda price, n, note: (note / n - price) * n,
    "twice_as_many": lambda a: 3 * a,
    "fewer_points": lambda a, fewer: 2 * a - fewer,
    "vegetable_patch": lambda rows, each, others: (rows + others / each) * each,
    "shared_marbles": lambda total, gift, friends: (total - gift) / friends,
    "ribbon_left": lambda length, n, piece: (length / piece - n) * piece,
    "fence": lambda length, width: length + width + length + width,
    "train_ride": lambda h, m, h2, m2: (h2 * 60 + m2) - (h * 60 + m),
    "bottles_in_litres": lambda n, ml: n * (ml / 1000),
    "gives_half": lambda a, more: a - a / 2 + more,
    "bags_of_rolls": lambda am, pm, size: (am + pm) / size,
    "weekly_savings": lambda start, weekly, weeks: weekly * (weeks + start / weekly),
    "older_sister": lambda age, older, years: (age + years) + older,
    "voucher": lambda price, off, paper: price - (off + paper),
    "not_on_foot": lambda n, percent: n * (1 - percent / 100),
    "bottling": lambda rate, hours: sum([rate] * 60) * hours,
    # three steps
    "market_stall": lambda p, q, a, b: sum(x * y for x, y in ((p, a), (q, b))),
    "more_flour": lambda eaters, grams, guests, there: grams * (guests / eaters) - there,
    "two_legs": lambda t, slow, t2, fast: (t + t2) * slow + t2 * (fast - slow),
    "three_scores": lambda *scores: sum(scores) / len(scores),
    "pairs_on_sale": lambda price, off, n: n * price - n * price * off / 100,
    "two_of_three": lambda a, fewer: 4 * a - fewer,
    "money_backwards": lambda lunch, gift, left: (left + lunch - gift) / F(1, 2),
    "coin_jar": lambda n, big, m, small: n * (big / 100) + m * (small / 100),
    "leaking_tank": lambda full, start, pump, leak: (full - start) / (pump - leak),
    "tiles_missing": lambda length, width, tiles, there: (length * width - there / tiles) * tiles,
    "library_day": lambda shelves, each, lent, back: back - lent + each * shelves,
    "pages_to_go": lambda pages, daily, days, sunday: pages - (sunday + days * daily),
    "minibuses": lambda pupils, adults, seats: ceil((pupils + adults) / seats),
    "left_over": lambda a, b, size: (a % size + b % size) % size,
    "shelves_from_board": lambda metres, cm, spoilt: metres / (cm / 100) - spoilt,
    "green_paint": lambda blue, yellow, litres: litres * (blue / (blue + yellow)),
    "mothers_age": lambda age, times, later: later + age * (times - 1),
    "thermometer": lambda warm, drop, hours, rise: warm + rise - hours * drop,
    # four steps
    "family_ticket": lambda p, q, group, a, c: a * p - (group - c * q),
    "overtime": lambda base, wage, more, worked, fare: worked * wage + (worked - base) * (more - wage) - fare,
    "orchard_crates": lambda rows, trees, kg, juice, crate: rows * trees * kg / crate - juice / crate,
    "three_people": lambda a, fewer: 7 * a - fewer,
    "trip_fund": lambda pupils, paid, coach, entry: pupils * (paid - entry) - coach,
    "lawn_and_pond": lambda a, b, s, s2, price: price * a * b - price * s * s2,
    "phone_bill": lambda base, free, cents, used: base - free * cents / 100 + used * cents / 100,
    "last_game": lambda games, mean, wanted: wanted + games * (wanted - mean),
    "closing_gap": lambda km, v, w, minutes: km - v * minutes / 60 - w * minutes / 60,
    "pottery_stall": lambda n, paid, gifts, price, fee: price * n - price * gifts - (fee + paid),
    "up_then_down": lambda price, up, down: price * (1 + up / 100) * (1 - down / 100),
    "relay_team": lambda a, b, c, minutes: minutes * 60 - sum((a, b, c)),
    "rain_barrel": lambda full, used, n, each, garden: (full - used) / (garden + each * n),
    "ages_backwards": lambda y, age, younger, later: ((age - y) - younger) * 2 + later,
    "stamp_album": lambda n, each, more: n * (each * F(3, 4)) + more,
    "jam_jars": lambda a, p, b, q, jars: a * p / jars + b * q / jars,
    "empty_chairs": lambda rows, chairs, classes, pupils, guests: rows * chairs - (guests + pupils * classes),
    # five steps
    "fuel_for_commuting": lambda km, days, use, hundred, weeks: (km + km) / hundred * use * (days * weeks),
    "half_price_evening": lambda price, full, half, cost: price * (full + half / 2) - cost,
    "weeks_to_goal": lambda p, off, saved, hours, wage, spent: (p - (off + saved)) / (wage * hours - spent),
    "ferry_takings": lambda a, p, b, q, c, r: sum(x * y for x, y in ((a, p), (b, q), (c, r))),
    "two_carpets": lambda a, b, c, d, price, fee: a * b * price + c * d * price + fee,
    "average_speed": lambda t, v, t2, w: v + (w - v) * t2 / (t + t2),
    "long_comparison": lambda a, more: a + 2 * a + a / 2 + more,
    "two_syrups": lambda a, p, b, q: a * (p / 100) + b * (q / 100),
    "faulty_parts": lambda n, rate, hours, bad, box: (n * hours * rate) * (1 - bad / 100) / box,
    "bouquets": lambda a, b, x, y, size, price: (a + b - x - y) / size * price,
    "paper_packs": lambda classes, pupils, each, pack, there, days: days * each * pupils * classes / pack - there,
    "filling_a_pool": lambda a, b, c, litres, rate: a * b * c * litres / (60 * rate),
    "purse_backwards": lambda ticket, book, gift, now: ticket + 2 * book + 4 * (now - gift),
    "two_tariffs": lambda base, rate, base2, rate2, used: (base2 + used * rate2) - (base + used * rate),
    "shared_taxi": lambda n, base, rate, wait, km, minutes: base / n + km * rate / n + minutes * wait / n,
    "dozens_of_eggs": lambda hens, each, eaten, price, weeks: weeks * (hens * each - eaten) * price / 12,
    "prize_shares": lambda total, a, b, c, spent: total * (a / (a + b + c)) - spent,
    "time_in_motion": lambda h, zero, h2, m2, stops, each: (h2 - h) * 60 + m2 - zero - sum([each] * int(stops)),
}
FRACTIONS = {"a third": F(1, 3), "a quarter": F(1, 4), "a fifth": F(1, 5), "half": F(1, 2)}


def third_then_quarter(question: str, total: F) -> F:
    """The one story whose fractions are words."""
    left = total
    for sentence in question.split(". ")[:2]:
        left -= left * next(share for words, share in FRACTIONS.items() if words in sentence)
    return left
