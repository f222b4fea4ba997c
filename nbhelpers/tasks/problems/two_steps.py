"""Level 1: stories of two steps, with small numbers."""

from decimal import Decimal

from .drawing import Draw, cents, count, exact, usd, whole


def egg_trays(d: Draw) -> tuple[str, str]:
    who, trays, each, cracked = d.person(), d.number(3, 9), d.number(10, 30, 2), d.number(2, 9)
    return (
        f"{who} carries {trays} trays of eggs out of the hen house. There are {each} eggs on every tray. On the way "
        f"{cracked} of the eggs crack. How many eggs are still good?"
    ), whole(trays * each - cracked)


def free_seats(d: Draw) -> tuple[str, str]:
    seats, riding, more = d.number(44, 70), d.number(11, 25), d.number(4, 15)
    return (
        f"A bus has {seats} seats. When it pulls up at the market, {riding} passengers are in it; {more} people get on "
        "and nobody gets off. Everybody takes a seat. How many seats are free now?"
    ), whole(seats - riding - more)


def cinema_change(d: Draw) -> tuple[str, str]:
    who, tickets, price = d.person(), d.number(2, 5), d.decimal("5.10", "9.80", "0.10")
    where = d.pick("cinema", "swimming pool", "puppet theatre", "science museum")
    return (
        f"A ticket for the {where} costs {usd(price)}. {who} buys {tickets} of them and hands over a $50 note. How "
        f"many dollars of change does {who.she} get?"
    ), cents(50 - tickets * price)


def twice_as_many(d: Draw) -> tuple[str, str]:
    (who, other), some = d.people(2), d.number(6, 160)
    thing = d.pick("shells", "chestnuts", "smooth pebbles", "pine cones")
    return (
        f"{who} finds {some} {thing} on a walk. {other} finds twice as many. How many {thing} have the two of them "
        "found together?"
    ), whole(some + 2 * some)


def fewer_points(d: Draw) -> tuple[str, str]:
    (who, other), points, fewer = d.people(2), d.number(18, 60), d.number(3, 15)
    game = d.pick("basketball", "darts", "table tennis", "a card game")
    return (
        f"Playing {game}, {who} makes {points} points and {other} makes {fewer} fewer than {who}. How many points do "
        "they make between them?"
    ), whole(points + points - fewer)


def vegetable_patch(d: Draw) -> tuple[str, str]:
    who, rows, each, others = d.person(), d.number(3, 12), d.number(4, 15), d.number(5, 30)
    plant, other = d.pick(("tomato", "pepper"), ("leek", "pumpkin"), ("cabbage", "bean"))
    return (
        f"In {who}'s vegetable patch there are {rows} rows with {each} {plant} plants each. At the edge grow {others} "
        f"{other} plants. How many plants are there in the patch?"
    ), whole(rows * each + others)


def shared_marbles(d: Draw) -> tuple[str, str]:
    (who, other), friends, each, gift = d.people(2), d.number(3, 8), d.number(4, 19), d.number(3, 20)
    thing = d.pick("marbles", "beads", "trading cards", "stickers")
    return (
        f"{who} owns {friends * each + gift} {thing}. {gift} of them go to {other}; the others {who} shares out "
        f"equally among {friends} cousins. How many {thing} does each cousin get?"
    ), whole(each)


def ribbon_left(d: Draw) -> tuple[str, str]:
    who, pieces, piece = d.person(), d.number(2, 6), d.decimal("0.3", "1.4", "0.1")
    length = pieces * piece + d.decimal("0.2", "2.5", "0.1")
    thing = d.pick("ribbon", "string", "copper wire", "cord")
    return (
        f"A roll holds {count(length, 'metre')} of {thing}. {who} cuts {pieces} pieces from it, each "
        f"{count(piece, 'metre')} long. How many metres of {thing} are left on the roll?"
    ), exact(length - pieces * piece)


def fence(d: Draw) -> tuple[str, str]:
    width = d.number(6, 40)
    length = width + d.number(3, 30)
    what = d.pick("paddock", "playground", "orchard", "sheep pen")
    return (
        f"A rectangular {what} is {length} metres long and {width} metres wide. How many metres of fence does it take "
        "to go all the way round?"
    ), whole(2 * (length + width))


def train_ride(d: Draw) -> tuple[str, str]:
    hour, minute, hours, more = d.number(6, 18), d.number(5, 30, 5), d.number(1, 4), d.number(2, 25)
    line = d.pick("train", "coach", "ferry")
    return (
        f"A {line} sets off at {hour}:{minute:02} and reaches its goal at {hour + hours}:{minute + more:02} on the "
        "same day. How many minutes is it under way?"
    ), whole(hours * 60 + more)


def bottles_in_litres(d: Draw) -> tuple[str, str]:
    who, bottles, size = d.person(), d.number(3, 60), d.pick(200, 250, 330, 400, 500, 700, 750)
    drink = d.pick("lemonade", "apple juice", "water", "iced tea")
    return (
        f"For a street party {who} fills {bottles} bottles with {drink}. Each bottle holds {size} millilitres. How "
        f"many litres of {drink} is that in all?"
    ), exact(Decimal(bottles * size) / 1000)


def gives_half(d: Draw) -> tuple[str, str]:
    (who, other), half, more = d.people(2), d.number(8, 40), d.number(3, 25)
    thing = d.pick("comic books", "stamps", "postcards", "badges")
    return (
        f"{who} has {2 * half} {thing} and gives half of them to {other}. At a flea market {who.she} then buys {more} "
        f"new ones. How many {thing} does {who} have now?"
    ), whole(half + more)


def bags_of_rolls(d: Draw) -> tuple[str, str]:
    size, bags, afternoon = d.number(4, 9), d.number(9, 20), d.number(12, 30)
    thing = d.pick("rolls", "dumplings", "muffins", "samosas")
    return (
        f"A kitchen makes {size * bags - afternoon} {thing} in the morning and {afternoon} in the afternoon. All of "
        f"them are put into bags of {size}. How many bags are filled?"
    ), whole(bags)


def weekly_savings(d: Draw) -> tuple[str, str]:
    who, start, weekly, weeks = d.person(), d.number(15, 80), d.number(3, 14), d.number(4, 12)
    return (
        f"There are {usd(start)} in {who}'s money box. Every week {who.she} adds {usd(weekly)}. How many dollars are "
        f"in the box after {weeks} weeks?"
    ), whole(start + weekly * weeks)


def older_sister(d: Draw) -> tuple[str, str]:
    (who, other), age, older, years = d.people(2), d.number(5, 16), d.number(2, 9), d.number(3, 20)
    return (
        f"{who} is {age} years old, and {other} is {count(older, 'year')} older than {who}. How old will {other} be in "
        f"{years} years?"
    ), whole(age + older + years)


def voucher(d: Draw) -> tuple[str, str]:
    who, price, off, paper = d.person(), d.decimal("38.50", "89.90", "0.70"), d.number(4, 12), d.pick(5, 10, 15)
    thing = d.pick("jacket", "rucksack", "desk lamp", "pair of boots")
    return (
        f"A {thing} costs {usd(price)}. In the sale it is {usd(off)} cheaper, and {who} also hands in a voucher worth "
        f"{usd(paper)}. How many dollars does {who} have to pay?"
    ), cents(price - off - paper)


def not_on_foot(d: Draw) -> tuple[str, str]:
    pupils, percent = d.number(20, 300, 20), d.number(5, 90, 5)
    way = d.pick("walk to school", "eat at the canteen", "play an instrument", "speak two languages")
    return (f"Of the {pupils} pupils of a school, {percent}% {way}. How many of the pupils do not {way}?"), whole(
        pupils - Decimal(pupils * percent) / 100
    )


def bottling(d: Draw) -> tuple[str, str]:
    rate, hours = d.number(6, 45), d.number(2, 9)
    machine, thing = d.pick(("bottling", "bottles"), ("labelling", "jars"), ("wrapping", "parcels"))
    return (
        f"A {machine} machine gets through {rate} {thing} a minute and runs without a pause. How many {thing} does it "
        f"get through in {hours} hours?"
    ), whole(rate * 60 * hours)


STORIES = (
    egg_trays, free_seats, cinema_change, twice_as_many, fewer_points, vegetable_patch, shared_marbles, ribbon_left,
    fence, train_ride, bottles_in_litres, gives_half, bags_of_rolls, weekly_savings, older_sister, voucher,
    not_on_foot, bottling,
)  # fmt: skip
