"""Level 2: stories of three steps."""

from decimal import Decimal

from .drawing import Draw, cents, count, usd, whole


def market_stall(d: Draw) -> tuple[str, str]:
    who, much, more = d.person(), d.number(2, 6), d.number(2, 5)
    price, other_price = d.decimal("1.10", "3.60", "0.10"), d.decimal("1.25", "4.75", "0.25")
    fruit, other = d.pick(("plums", "figs"), ("carrots", "mushrooms"), ("oranges", "cherries"), ("onions", "peas"))
    return (
        f"At a market stall a kilogram of {fruit} costs {usd(price)} and a kilogram of {other} costs "
        f"{usd(other_price)}. {who} takes {much} kilograms of {fruit} and {more} kilograms of {other}. "
        "How many dollars is that in all?"
    ), cents(much * price + more * other_price)


def more_flour(d: Draw) -> tuple[str, str]:
    who, eaters, guests, each = d.person(), d.number(2, 6), d.number(8, 20), d.number(40, 120, 5)
    there = d.number(50, each * guests - 30, 10)
    dish, need = d.pick(("pancakes", "flour"), ("risotto", "rice"), ("dal", "lentils"), ("couscous salad", "couscous"))
    return (
        f"A recipe of {dish} for {eaters} people takes {each * eaters} grams of {need}. {who} wants to cook it for "
        f"{guests} people and finds {there} grams of {need} in the cupboard. How many more grams of {need} are needed?"
    ), whole(each * guests - there)


def two_legs(d: Draw) -> tuple[str, str]:
    who, slow, fast, first, second = d.person(), d.number(3, 6), d.number(14, 24), d.number(2, 5), d.number(2, 4)
    return (
        f"{who} hikes for {first} hours at {slow} kilometres an hour and then rides a bicycle for {second} hours at "
        f"{fast} kilometres an hour. How many kilometres does {who} cover altogether?"
    ), whole(slow * first + fast * second)


def three_scores(d: Draw) -> tuple[str, str]:
    who, mean, up, down = d.person(), d.number(40, 88), d.number(2, 9), d.number(3, 11)
    event = d.pick("spelling tests", "archery rounds", "geography quizzes", "diving contests")
    return (
        f"In three {event} {who} earns {mean + up} points, {mean - down} points and {mean + down - up} points. What is "
        f"{who}'s average score?"
    ), whole(mean)


def pairs_on_sale(d: Draw) -> tuple[str, str]:
    who, price, percent, pairs = d.person(), d.number(20, 90, 2), d.pick(5, 10, 15, 20, 25, 30, 40), d.number(2, 6)
    thing = d.pick("pair of sandals", "pair of curtains", "pair of skates", "pair of gloves")
    return (
        f"A {thing} costs {usd(price)}. This week everything is {percent}% off. {who} buys {pairs} such pairs. How "
        "many dollars are paid for them?"
    ), cents(Decimal(price * (100 - percent) * pairs) / 100)


def two_of_three(d: Draw) -> tuple[str, str]:
    (who, other, third), some, fewer = d.people(3), d.number(9, 50), d.number(3, 8)
    verb, thing = d.pick(
        ("picks", "apples"), ("folds", "paper cranes"), ("plants", "bulbs"), ("sells", "raffle tickets")
    )
    return (
        f"{who} {verb} {some} {thing}. {other} {verb} twice as many as {who}, and {third} {verb} {fewer} fewer than "
        f"{other}. How many {thing} do {other} and {third} have together?"
    ), whole(2 * some + 2 * some - fewer)


def money_backwards(d: Draw) -> tuple[str, str]:
    who, lunch, gift = d.person(), d.number(6, 18), d.number(5, 30, 5)
    left = gift + d.number(3, 40)
    thing = d.pick("a book", "a fishing rod", "a scarf", "a chess set")
    return (
        f"{who} spends half of {who.her} money on {thing} and then {usd(lunch)} on lunch. In the evening "
        f"{who.her} uncle gives {who} {usd(gift)}, and now {who.she} has {usd(left)}. How many dollars did {who} have "
        "at the start?"
    ), whole(2 * (left - gift + lunch))


def coin_jar(d: Draw) -> tuple[str, str]:
    who, big, small = d.person(), d.number(7, 40), d.number(8, 60)
    other = d.pick(5, 10, 20)
    return (
        f"{who} empties a jar and counts {big} coins of 50 cents and {small} coins of {other} cents. How many dollars "
        "are these coins worth together?"
    ), cents(Decimal(big * 50 + small * other) / 100)


def leaking_tank(d: Draw) -> tuple[str, str]:
    leak, gain, minutes, start = d.number(2, 6), d.number(7, 25), d.number(8, 40), d.number(20, 150, 10)
    return (
        f"A tank for {gain * minutes + start} litres has {start} litres of water in it. A pump brings {gain + leak} "
        f"litres a minute, but {leak} litres a minute run out through a crack. After how many minutes is the tank full?"
    ), whole(minutes)


def tiles_missing(d: Draw) -> tuple[str, str]:
    who, length, width, tiles = d.person(), d.number(4, 12), d.number(2, 7), d.pick(4, 9, 16, 25)
    there = d.number(10, length * width * tiles - 15)
    where = d.pick("terrace", "bathroom", "kitchen", "hallway")
    return (
        f"{who} tiles the floor of a {where} that is {length} metres long and {width} metres wide. A square metre "
        f"takes {tiles} tiles. In the shed there are {count(there, 'tile')}. How many more tiles must {who} buy?"
    ), whole(length * width * tiles - there)


def library_day(d: Draw) -> tuple[str, str]:
    shelves, each, lent, back = d.number(5, 18), d.number(24, 60), d.number(15, 80), d.number(5, 60)
    what = d.pick("village library", "school library", "book bus")
    return (
        f"At sunrise a {what} has {shelves} full shelves of {each} books. During the day {lent} of the books are lent "
        f"out and {back} others are brought back. How many books are in the {what} at night?"
    ), whole(shelves * each - lent + back)


def pages_to_go(d: Draw) -> tuple[str, str]:
    who, daily, days, sunday, rest = d.person(), d.number(12, 35), d.number(3, 6), d.number(20, 70), d.number(10, 120)
    book = d.pick("novel", "biography", "travel book", "book of legends")
    return (
        f"A {book} has {daily * days + sunday + rest} pages. {who} reads {daily} pages a day for {days} days and "
        f"another {sunday} pages on Sunday. How many pages are there still to read?"
    ), whole(rest)


def minibuses(d: Draw) -> tuple[str, str]:
    seats, pupils, adults = d.number(8, 16), d.number(30, 110), d.number(3, 9)
    vehicle = d.pick(("minibus", "minibuses"), ("boat", "boats"), ("cable car", "cable cars"))
    return (
        f"{pupils} pupils and {adults} teachers go on an outing. A {vehicle[0]} takes {seats} people at most. What is "
        f"the smallest number of {vehicle[1]} in which all of them find a place?"
    ), whole(-(-(pupils + adults) // seats))


def left_over(d: Draw) -> tuple[str, str]:
    (who, other), size, full = d.people(2), d.number(6, 12), d.number(6, 15)
    rest = d.number(1, size - 1)
    mine = d.number(12, size * full - 10)
    thing = d.pick("candles", "biscuits", "soaps", "tulip bulbs")
    return (
        f"{who} has {mine} {thing} and {other} has {size * full + rest - mine}. They put them together and fill as "
        f"many boxes of {size} as they can. How many {thing} are left over?"
    ), whole(rest)


def shelves_from_board(d: Draw) -> tuple[str, str]:
    who, piece, pieces = d.person(), d.number(20, 60, 5), d.number(8, 30)
    spoilt = d.number(2, 6)
    thing = d.pick("board", "pipe", "bamboo pole", "rail")
    return (
        f"{who} saws a {thing} of {count(Decimal(piece * pieces) / 100, 'metre')} into pieces of {piece} centimetres. "
        f"{spoilt} of the pieces turn out crooked. How many straight pieces are there?"
    ), whole(pieces - spoilt)


def green_paint(d: Draw) -> tuple[str, str]:
    who, yellow, part = d.person(), d.number(2, 7), d.number(3, 12)
    blue = yellow + d.number(1, 4)
    things = d.pick(("blue and yellow paint", "blue paint"), ("sand and cement", "sand"), ("syrup and water", "syrup"))
    return (
        f"{who} mixes {things[0]} in the ratio {blue} to {yellow} and needs {part * (blue + yellow)} litres of the "
        f"mixture. How many litres of {things[1]} go into it?"
    ), whole(blue * part)


def mothers_age(d: Draw) -> tuple[str, str]:
    who, age, times, later = d.person(), d.number(4, 9), d.number(4, 7), d.number(11, 25)
    elder = d.pick("aunt", "mother", "father", "piano teacher")
    return (
        f"{who} is {age} years old, and {who.her} {elder} is {times} times as old. How old will the {elder} be when "
        f"{who} is {later}?"
    ), whole(age * times + later - age)


def thermometer(d: Draw) -> tuple[str, str]:
    drop, hours, rise, night = d.number(2, 4), d.number(2, 5), d.number(3, 9), d.number(1, 12)
    where = d.pick("in the desert", "on the mountain pass", "at the lighthouse", "in the valley")
    return (
        f"At four in the afternoon it is {night + drop * hours} degrees warm {where}. Then it gets {drop} degrees "
        f"colder every hour for {hours} hours. By the next noon it is {rise} degrees warmer again. "
        "How many degrees is it then?"
    ), whole(night + rise)


STORIES = (
    market_stall, more_flour, two_legs, three_scores, pairs_on_sale, two_of_three, money_backwards, coin_jar,
    leaking_tank, tiles_missing, library_day, pages_to_go, minibuses, left_over, shelves_from_board, green_paint,
    mothers_age, thermometer,
)  # fmt: skip
