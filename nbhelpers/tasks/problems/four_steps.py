"""Level 3: stories of four steps, with larger numbers."""

from decimal import Decimal

from .drawing import Draw, cents, plain, usd, whole


def family_ticket(d: Draw) -> tuple[str, str]:
    adults, children = d.number(2, 4), d.number(2, 6)
    price, child_price = d.decimal("11.50", "24.50", "0.50"), d.decimal("5.25", "9.75", "0.25")
    single = adults * price + children * child_price
    family = int(single) - d.number(3, 16)
    where = d.pick("zoo", "castle", "aquarium", "steam railway")
    return (
        f"At the {where} adults pay {usd(price)} and children {usd(child_price)}. A ticket for a whole group costs "
        f"{usd(family)}. How many dollars do {adults} adults and {children} children save with the group ticket?"
    ), cents(single - family)


def overtime(d: Draw) -> tuple[str, str]:
    who, wage, more, hours, extra = (
        d.person(),
        d.number(14, 28),
        d.number(4, 12),
        d.pick(30, 35, 38, 40),
        d.number(3, 12),
    )
    fare = d.number(12, 35)
    work = d.pick("in a bicycle workshop", "at a nursery garden", "in a print shop", "on a building site")
    return (
        f"{who} works {work}. The first {hours} hours of a week are paid at {usd(wage)} an hour, every hour beyond "
        f"them at {usd(wage + more)}. This week {who} works {hours + extra} hours and spends {usd(fare)} on bus fares. "
        f"How many dollars of the week's pay are left after the fares?"
    ), whole(hours * wage + extra * (wage + more) - fare)


def orchard_crates(d: Draw) -> tuple[str, str]:
    rows, trees, each, crate = d.number(4, 12), d.number(6, 15), d.pick(24, 30, 36, 40, 48), d.pick(8, 12)
    juice = (rows * trees * each) % crate + crate * d.number(4, 20)
    fruit = d.pick("apples", "pears", "apricots", "mangoes")
    return (
        f"An orchard has {rows} rows of {trees} trees, and each tree gives {each} kilograms of {fruit}. {juice} "
        f"kilograms are pressed for juice, and the rest is packed into crates of {crate} kilograms. "
        "How many crates are filled?"
    ), whole(Decimal(rows * trees * each - juice) / crate)


def three_people(d: Draw) -> tuple[str, str]:
    (who, other, third), some, fewer = d.people(3), d.number(14, 90), d.number(5, 35)
    verb, thing = d.pick(("swims", "lengths"), ("photographs", "birds"), ("delivers", "leaflets"), ("types", "pages"))
    return (
        f"{who} {verb} {some} {thing}, {other} {verb} three times as many, and {third} {verb} {fewer} fewer than "
        f"{other}. What is the number of {thing} for all three together?"
    ), whole(some + 3 * some + 3 * some - fewer)


def trip_fund(d: Draw) -> tuple[str, str]:
    pupils, paid, entry, left = d.number(18, 34), d.number(20, 36), d.number(4, 11), d.number(8, 95)
    coach = pupils * (paid - entry) - left
    return (
        f"For an excursion each of {pupils} pupils brings {usd(paid)}. The coach costs {usd(coach)}, and the entrance "
        f"fee is {usd(entry)} a pupil. How many dollars remain?"
    ), whole(left)


def lawn_and_pond(d: Draw) -> tuple[str, str]:
    length, width, side, price = d.number(18, 45), d.number(11, 17), d.number(3, 9), d.number(3, 14)
    ground, hole = d.pick(("garden", "pond"), ("courtyard", "flower bed"), ("square", "fountain"))
    cover = "lawn" if ground == "garden" else "paving"
    return (
        f"A {ground} is a rectangle, {length} metres by {width} metres, with a {hole} of {side} metres by {side} "
        f"metres in the middle. All the rest gets new {cover} at {usd(price)} a square metre. How many dollars does "
        f"the {cover} cost?"
    ), whole((length * width - side * side) * price)


def phone_bill(d: Draw) -> tuple[str, str]:
    who, base, free, extra, price = (
        d.person(),
        d.number(9, 25),
        d.number(100, 400, 50),
        d.number(15, 140),
        d.number(6, 29),
    )
    return (
        f"{who} pays {usd(base)} a month for the phone, {free} minutes included. Every further minute costs {price} "
        f"cents. Last month {who} was on the phone for {free + extra} minutes. How many dollars is the bill?"
    ), cents(base + Decimal(extra * price) / 100)


def last_game(d: Draw) -> tuple[str, str]:
    who, games, mean, up = d.person(), d.number(4, 9), d.number(12, 30), d.number(1, 3)
    sport = d.pick("basketball", "netball", "handball", "water polo")
    return (
        f"After {games} {sport} games {who} has an average of {mean} points a game. With one more game {who} wants the "
        f"average of all the games to be {mean + up}. How many points does that last game have to bring?"
    ), whole((games + 1) * (mean + up) - games * mean)


def closing_gap(d: Draw) -> tuple[str, str]:
    slow, fast, minutes, gap = d.number(60, 84, 12), d.number(96, 144, 12), d.number(20, 75, 5), d.number(8, 90)
    first, second = d.pick(("A lorry", "a motorcycle"), ("A coach", "an express train"), ("A tram", "a sports car"))
    km = (slow + fast) * minutes // 60 + gap
    return (
        f"{first} and {second} start at the same moment in two cities that are "
        f"{km} kilometres apart and move towards each other, at {slow} and {fast} kilometres an hour. How many "
        f"kilometres are still between them after {minutes} minutes?"
    ), whole(km - Decimal((slow + fast) * minutes) / 60)


def pottery_stall(d: Draw) -> tuple[str, str]:
    who, pots, gifts, price, fee = d.person(), d.number(25, 80), d.number(3, 9), d.number(9, 24), d.number(10, 30, 5)
    profit = d.number(20, (pots - gifts) * price // 2 - fee)
    thing = d.pick("mugs", "bowls", "vases", "woven baskets")
    return (
        f"{who} buys {pots} {thing} from a workshop for {usd((pots - gifts) * price - fee - profit)} in all, gives "
        f"{gifts} of them away and sells the others at {usd(price)} each. The place at the market costs {usd(fee)}. "
        f"How many dollars of profit does {who} make?"
    ), whole(profit)


def third_then_quarter(d: Draw) -> tuple[str, str]:
    who = d.person()
    first, share = d.pick(("a third", 3), ("a quarter", 4), ("a fifth", 5))
    second, rest = d.pick(("a quarter", 4), ("half", 2))
    total = share * rest * d.number(6, 40)
    thing, verb = d.pick(("pages of a diary", "reads"), ("slides of an archive", "scans"), ("envelopes", "stamps"))
    return (
        f"{who} has {total} {thing} to get through and {verb} {first} of them on Monday. On Tuesday {who} {verb} "
        f"{second} of those that are left. How many are there still to do?"
    ), whole(Decimal(total) * (share - 1) / share * (rest - 1) / rest)


def up_then_down(d: Draw) -> tuple[str, str]:
    price, up, down = d.number(40, 600, 20), d.number(5, 50, 5), d.number(5, 40, 5)
    thing = d.pick("sewing machine", "guitar", "telescope", "washing machine")
    return (
        f"A {thing} costs {usd(price)}. First the price goes up by {up}%, then the new price is cut by {down}%. How "
        f"many dollars does the {thing} cost in the end?"
    ), cents(Decimal(price * (100 + up) * (100 - down)) / 10000)


def relay_team(d: Draw) -> tuple[str, str]:
    minutes, a, b, c = d.number(4, 5), d.number(61, 79), d.number(62, 78), d.number(60, 77)
    verb = d.pick("run", "swim", "row", "ski")
    return (
        f"Three friends {verb} a relay one after another and take {a}, {b} and {c} seconds. The record is {minutes} "
        f"minutes. By how many seconds are they faster than the record?"
    ), whole(minutes * 60 - a - b - c)


def rain_barrel(d: Draw) -> tuple[str, str]:
    people, each, garden, days = d.number(2, 7), d.number(12, 45), d.number(20, 90, 5), d.number(6, 30)
    used = d.number(50, 400, 10)
    place = d.pick("a mountain hut", "an island house", "a desert camp", "a lighthouse")
    daily = people * each + garden
    return (
        f"The tank of {place} was filled with "
        f"{plain(daily * days + used)} litres of water, of which {used} litres have been used. From today {people} "
        f"people take {each} litres each a day, and the garden takes {garden} litres a day. "
        "For how many days will the water last?"
    ), whole(days)


def ages_backwards(d: Draw) -> tuple[str, str]:
    (who, other, third), younger, age = d.people(3), d.number(2, 9), d.number(6, 20)
    years, later = d.number(2, 8), d.number(3, 15)
    return (
        f"In {years} years {third} will be {age + younger + years} years old. {other} is {younger} years younger than "
        f"{third}, and {who} is twice as old as {other}. How old will {who} be in {later} years?"
    ), whole(2 * age + later)


def stamp_album(d: Draw) -> tuple[str, str]:
    (who, other), packs, each, more = d.people(2), d.number(6, 20), d.number(8, 28, 4), d.number(15, 70)
    thing = d.pick("stamps", "football cards", "coins", "fossils")
    return (
        f"{who} brings {packs} boxes with {each} {thing} each to a swap meeting. A quarter of all these {thing} go to "
        f"{other}, and {more} others come in. How many {thing} does {who} have afterwards?"
    ), whole(Decimal(packs * each * 3) / 4 + more)


def jam_jars(d: Draw) -> tuple[str, str]:
    who, fruit, sugar, jars = d.person(), d.number(4, 12), d.number(2, 8), d.pick(8, 10, 16, 20)
    while True:  # until a jar costs whole cents
        price, sugar_price = d.decimal("2.20", "5.80", "0.20"), d.decimal("0.90", "1.80", "0.10")
        if (fruit * price + sugar * sugar_price) * 100 % jars == 0:
            break
    thing = d.pick("raspberries", "apricots", "blackcurrants", "quinces")
    return (
        f"{who} boils jam from {fruit} kilograms of {thing} at {usd(price)} a kilogram and {sugar} kilograms of sugar "
        f"at {usd(sugar_price)} a kilogram. It fills {jars} jars. How many dollars does the jam in one jar cost?"
    ), cents((fruit * price + sugar * sugar_price) / jars)


def empty_chairs(d: Draw) -> tuple[str, str]:
    rows, chairs = d.number(12, 25), d.number(14, 30)
    classes, pupils, guests = d.number(3, 6), d.number(18, 24), d.number(7, 20)
    show = d.pick("concert", "school play", "prize-giving", "film night")
    return (
        f"For a {show} the hall is set out with {rows} rows of {chairs} chairs. {classes} classes of {pupils} pupils "
        f"come, and {guests} guests besides. How many chairs stay empty?"
    ), whole(rows * chairs - classes * pupils - guests)


STORIES = (
    family_ticket, overtime, orchard_crates, three_people, trip_fund, lawn_and_pond, phone_bill, last_game, closing_gap,
    pottery_stall, third_then_quarter, up_then_down, relay_team, rain_barrel, ages_backwards, stamp_album, jam_jars,
    empty_chairs,
)  # fmt: skip
