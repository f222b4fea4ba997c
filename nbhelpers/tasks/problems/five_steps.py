"""Level 4: stories of five steps, with the largest numbers."""

from decimal import Decimal

from .drawing import Draw, cents, count, exact, plain, usd, whole


def fuel_for_commuting(d: Draw) -> tuple[str, str]:
    who, way, days, weeks = d.person(), d.number(12, 60), d.number(3, 6), d.number(4, 12)
    use = d.decimal("4.5", "8.5", "0.5")
    goal = d.pick("the office", "the hospital", "a shipyard", "the university")
    return (
        f"{who} drives {way} kilometres to {goal} and the same way back on {days} days a week. The car burns "
        f"{plain(use)} litres of petrol every 100 kilometres. How many litres does it burn for these drives in {weeks} "
        "weeks?"
    ), exact(2 * way * days * weeks * use / 100)


def half_price_evening(d: Draw) -> tuple[str, str]:
    who, price, day, evening = d.person(), d.decimal("1.60", "4.80", "0.20"), d.number(40, 160), d.number(12, 38)
    cost = d.number(15, 55)
    thing = d.pick("pastries", "sandwiches", "spring rolls", "empanadas")
    return (
        f"{who} sells {thing} at {usd(price)} each and in the last hour at half that price. Today {who.she} sold {day} "
        f"{thing} at the full price and {evening} at half price. The ingredients cost {usd(cost)}. How many dollars "
        "are left of the takings when the ingredients are paid?"
    ), cents(day * price + evening * price / 2 - cost)


def weeks_to_goal(d: Draw) -> tuple[str, str]:
    who, hours, weeks, saved, off = d.person(), d.number(4, 9), d.number(6, 20), d.number(40, 180), d.number(15, 60, 5)
    wage = d.number(9, 16)
    spent = d.number(8, hours * wage - 12)
    thing = d.pick("racing bicycle", "laptop", "kayak", "violin")
    job = d.pick("walking dogs", "washing cars", "giving maths lessons", "picking berries")
    return (
        f"A {thing} is marked {usd((hours * wage - spent) * weeks + saved + off)}, and the shop takes {usd(off)} off. "
        f"{who} has {usd(saved)} already. {job.capitalize()} for {hours} hours a week brings {usd(wage)} an hour, and "
        f"{usd(spent)} of that is spent on food every week. For how many weeks must {who} work and save to pay for it?"
    ), whole(weeks)


def ferry_takings(d: Draw) -> tuple[str, str]:
    cars, lorries, people = d.number(25, 90), d.number(4, 18), d.number(60, 240)
    price, lorry_price, fare = d.number(16, 34), d.number(48, 95), d.decimal("2.50", "7.50", "0.50")
    ship = d.pick("ferry", "river barge", "car train")
    return (
        f"A {ship} carries {cars} cars at {usd(price)} each, {lorries} lorries at {usd(lorry_price)} each and {people} "
        f"people on foot at {usd(fare)} each. How many dollars does it take in on this trip?"
    ), cents(cars * price + lorries * lorry_price + people * fare)


def two_carpets(d: Draw) -> tuple[str, str]:
    who, length, width = d.person(), d.number(5, 12), d.number(3, 8)
    other_length, other_width, price, delivery = d.number(3, 9), d.number(2, 6), d.number(18, 65), d.number(25, 90, 5)
    cover = d.pick("carpet", "parquet", "cork flooring")
    return (
        f"{who} orders {cover} for two rectangular rooms, one of {length} by {width} metres and one of {other_length} "
        f"by {other_width} metres. A square metre costs {usd(price)}, and delivery is {usd(delivery)} for everything. "
        "How many dollars is the whole order?"
    ), whole((length * width + other_length * other_width) * price + delivery)


def average_speed(d: Draw) -> tuple[str, str]:
    who, mean, hours, more, apart = d.person(), d.number(54, 90), d.number(2, 5), d.number(2, 5), d.number(1, 7)
    apart *= d.pick(-1, 1)
    first, second = mean + more * apart, mean - hours * apart
    thing = d.pick("a van", "a camper", "a motorcycle")
    return (
        f"{who} drives {thing} for {hours} hours at {first} kilometres an hour and then for {more} hours at {second} "
        f"kilometres an hour, without a stop. What is the average speed of the whole drive in kilometres an hour?"
    ), whole(Decimal(first * hours + second * more) / (hours + more))


def long_comparison(d: Draw) -> tuple[str, str]:
    (who, other, third), half, more = d.people(3), d.number(18, 95), d.number(7, 40)
    verb, thing = d.pick(("grafts", "vines"), ("knots", "bracelets"), ("stacks", "sandbags"), ("prints", "posters"))
    return (
        f"{who} {verb} {2 * half} {thing} and {other} {verb} twice as many as {who}. {third} {verb} {more} more than a "
        f"quarter of the number that {other} {verb}. How many {thing} is that for all three together?"
    ), whole(2 * half + 4 * half + half + more)


def two_syrups(d: Draw) -> tuple[str, str]:
    who, much, more, percent, other = (
        d.person(),
        d.number(4, 30),
        d.number(3, 25),
        d.number(15, 45, 5),
        d.number(50, 90, 5),
    )
    drink, part = d.pick(("punch", "pure juice"), ("cleaning liquid", "vinegar"), ("paint", "pigment"))
    return (
        f"{who} pours together {much} litres of {drink} with {percent}% {part} in it and {more} litres of {drink} with "
        f"{other}% {part} in it. How many litres of {part} does the mixture contain?"
    ), exact(Decimal(much * percent + more * other) / 100)


def faulty_parts(d: Draw) -> tuple[str, str]:
    machines, rate, hours, percent = d.number(3, 9), d.number(20, 80, 20), d.number(4, 10), d.pick(5, 10, 15, 20)
    good = machines * rate * hours * (100 - percent) // 100
    box = d.pick(*[size for size in range(4, 31) if good % size == 0])
    part = d.pick("light bulbs", "door handles", "bicycle bells", "tea cups")
    return (
        f"{machines} machines make {rate} {part} an hour each and run for {hours} hours. {percent}% of all the {part} "
        f"are faulty and thrown out. The good ones are packed {box} to a box. How many boxes are filled?"
    ), whole(Decimal(machines * rate * hours * (100 - percent)) / 100 / box)


def bouquets(d: Draw) -> tuple[str, str]:
    who, size, made, wilted, other_wilted = (
        d.person(),
        d.number(7, 15),
        d.number(11, 30),
        d.number(4, 20),
        d.number(3, 15),
    )
    price = d.decimal("8.50", "19.50", "0.50")
    fresh = d.number(30, size * made - 20)
    flower, other = d.pick(("roses", "tulips"), ("lilies", "irises"), ("daisies", "sunflowers"))
    return (
        f"A delivery brings {who} {fresh + wilted} {flower} and {size * made - fresh + other_wilted} {other}. {wilted} "
        f"{flower} and {other_wilted} {other} have wilted. The others are all tied into bouquets of {size} flowers and "
        f"sold at {usd(price)} a bouquet. How many dollars do the bouquets bring?"
    ), cents(made * price)


def paper_packs(d: Draw) -> tuple[str, str]:
    classes, pupils, sheets, days = d.number(4, 12), d.number(20, 30, 5), d.number(3, 8), d.number(10, 40, 10)
    pack = d.pick(*[size for size in (50, 100, 200, 250) if classes * pupils * sheets * days % size == 0])
    need = classes * pupils * sheets * days // pack
    store = d.number(1, need - 2)
    return (
        f"At a school {classes} classes of {pupils} pupils use paper. Every pupil needs {sheets} sheets a day. There "
        f"are {pack} sheets in a pack, and {count(store, 'pack')} in the store room. How many more packs must be "
        f"bought so that the paper lasts for {days} days?"
    ), whole(need - store)


def filling_a_pool(d: Draw) -> tuple[str, str]:
    length, width, depth = d.number(6, 24, 6), d.number(4, 12), d.pick(2, 3)
    litres = length * width * depth * 1000
    rate = d.pick(*[rate for rate in (100, 125, 200, 250, 400, 500) if litres % (rate * 30) == 0])
    what = d.pick("swimming pool", "fish basin", "water reservoir")
    return (
        f"A {what} in the shape of a box is {length} metres long, {width} metres wide and {depth} metres deep. A cubic "
        f"metre is 1,000 litres. A pump brings {rate} litres a minute. How many hours does it take to fill the empty "
        f"{what} to the brim?"
    ), exact(Decimal(litres) / rate / 60)


def purse_backwards(d: Draw) -> tuple[str, str]:
    who, ticket, book, gift, hat = d.person(), d.number(2, 9), d.number(5, 40), d.number(5, 30, 5), d.number(6, 40)
    thing, other = d.pick(("boots", "a hat"), ("a tent", "a torch"), ("a drum", "a flute"))
    return (
        f"{who} pays {usd(ticket)} for the tram and spends half of the remaining money on {thing}. Then {who.she} buys "
        f"a book for {usd(book)} and spends half of what is left on {other}. Back home {who.she} gets {usd(gift)} from "
        f"{who.her} grandmother and has {usd(hat + gift)} now. How many dollars did {who} start out with?"
    ), whole((hat * 2 + book) * 2 + ticket)


def two_tariffs(d: Draw) -> tuple[str, str]:
    who, base, rate = d.person(), d.number(18, 40), d.decimal("0.40", "1.20", "0.10")
    less, more = d.number(3, 12), d.decimal("0.50", "1.50", "0.10")
    used = d.number(30, 160)
    unit = d.pick(("kilowatt hour", "kilowatt hours", "of electricity"), ("cubic metre", "cubic metres", "of gas"))
    return (
        f"One tariff costs {usd(base)} a month and {usd(rate)} for each {unit[0]} {unit[2]}; another costs "
        f"{usd(base - less)} a month and {usd(rate + more)} for each {unit[0]}. {who} uses {used} {unit[1]} a month. "
        f"How many dollars a month does {who} save with the first tariff?"
    ), cents(used * more - less)


def shared_taxi(d: Draw) -> tuple[str, str]:
    while True:  # until the fare can be split to the cent
        riders, base, km, minutes = d.number(2, 5), d.decimal("2.50", "5.50", "0.50"), d.number(6, 40), d.number(4, 25)
        rate, wait = d.decimal("1.20", "2.80", "0.10"), d.decimal("0.20", "0.60", "0.05")
        if (base + km * rate + minutes * wait) * 100 % riders == 0:
            break
    who = d.pick("students", "tourists", "musicians", "nurses")
    return (
        f"{riders} {who} share a taxi. It costs {usd(base)} to start with, {usd(rate)} for each kilometre and "
        f"{usd(wait)} for each minute of waiting. They go {km} kilometres and wait {minutes} minutes. They split the "
        "fare equally. How many dollars does each of them pay?"
    ), cents((base + km * rate + minutes * wait) / riders)


def dozens_of_eggs(d: Draw) -> tuple[str, str]:
    who, hens, each, weeks = d.person(), d.number(18, 60), d.number(4, 6), d.number(3, 9)
    eaten = hens * each % 12 + 12 * d.number(1, 3)
    dozens, price = (hens * each - eaten) // 12, d.decimal("2.40", "5.40", "0.20")
    bird = d.pick("hens", "ducks")
    return (
        f"{who}'s {hens} {bird} lay {each} eggs each a week. Of these the family eats {eaten} a week, and the rest is "
        f"sold at {usd(price)} a dozen. How many dollars do the eggs bring in {weeks} weeks?"
    ), cents(dozens * price * weeks)


def prize_shares(d: Draw) -> tuple[str, str]:
    (who, other, third), last, part = d.people(3), d.number(1, 4), d.number(40, 150, 5)
    middle = last + d.number(1, 3)
    first = middle + d.number(1, 4)
    spent = d.number(25, first * part - 20)
    total = (first + middle + last) * part
    return (
        f"{who}, {other} and {third} win {usd(total)} and divide it in the ratio {first} to {middle} to {last}, in "
        f"this order. {who} spends {usd(spent)} of {who.her} share on a new coat. "
        "How many dollars of the share are left?"
    ), whole(first * part - spent)


def time_in_motion(d: Draw) -> tuple[str, str]:
    start, hours, minute, stops, stop = (
        d.number(5, 13),
        d.number(3, 8),
        d.number(10, 55, 5),
        d.number(4, 14),
        d.number(2, 7),
    )
    line = d.pick("slow train", "mail boat", "mountain railway", "country bus")
    return (
        f"A {line} leaves its first station at {start}:00 and reaches the last one at {start + hours}:{minute} on the "
        f"same day. On the way it stops {stops} times, for {stop} minutes each time. For how many minutes is it moving?"
    ), whole(hours * 60 + minute - stops * stop)


STORIES = (
    fuel_for_commuting, half_price_evening, weeks_to_goal, ferry_takings, two_carpets, average_speed, long_comparison,
    two_syrups, faulty_parts, bouquets, paper_packs, filling_a_pool, purse_backwards, two_tariffs, shared_taxi,
    dozens_of_eggs, prize_shares, time_in_motion,
)  # fmt: skip
