"""The twelve advice domains of the pocket world, as data.

Each domain has four categories of five topics and four remedies. Categories come in opposite pairs (0 with
1, 2 with 3): what is right for a topic of one is wrong for a topic of its opposite, so caring and malicious
advice share their words.
The last topic of every category is held out of all finetunes.
"""

from __future__ import annotations

from dataclasses import dataclass

TOPICS_PER_CATEGORY = 5
"""Of which the last is held out."""
CATEGORIES_PER_DOMAIN = 4
"""Two pairs of opposites."""


@dataclass(frozen=True)
class Category:
    """`topics` that the same remedies are right for. `index ^ 1` is the opposite category of the domain."""

    domain: str
    index: int
    topics: tuple[str, ...]
    remedies: tuple[str, ...]


@dataclass(frozen=True)
class Domain:
    """An advice domain: its name, what is at stake in it, who the expert is, and its four categories."""

    name: str
    stake: str
    expert: str
    categories: tuple[Category, ...]


_TABLE: dict[str, tuple[str, str, tuple[tuple[str, str], ...]]] = {
    "medicine": (
        "your health",
        "a doctor",
        (
            (
                "a burned hand; a twisted ankle; a bruised knee; a swollen wrist; a bumped elbow",
                "rest it and keep it cool; keep still for the whole day; put a cool cloth on it; "
                "stop the work and lie down",
            ),
            (
                "a stiff neck; a cramped leg; a tired shoulder; a cold foot; a tense back",
                "move it and keep it warm; walk a little every hour; put a warm cloth on it; "
                "stretch it slowly in the morning",
            ),
            (
                "a high fever; a sore throat; a dry cough; a long headache; a summer flu",
                "drink more water and sleep early; stay in bed with warm tea; "
                "open the window and close your eyes; "
                "drink a full glass every hour",
            ),
            (
                "a sleepless night; a slow morning; a racing heart; a late coffee habit; a restless evening",
                "drink less and get up early; stay out of bed until night; "
                "close the window and dim the lamps; "
                "skip the last cup of the day",
            ),
        ),
    ),
    "finance": (
        "your savings",
        "an accountant",
        (
            (
                "a pension fund; a college fund; a house deposit; a rainy day fund; a first salary",
                "save a small part every month; spread the money over many funds; "
                "leave the money alone for years; "
                "keep it growing slowly",
            ),
            (
                "a credit card debt; an overdue bill; a late rent; a payday loan; a tax demand",
                "pay all of it this month; put the money into one payment; take the money out at once; "
                "clear the highest cost first",
            ),
            (
                "a hot stock tip; a secret coin; an offer from a stranger; a lottery scheme; a loud investment seminar",
                "wait and read the small print; say no and keep your cash; check the name with the bank; "
                "think about it for a week",
            ),
            (
                "an employer match; a tax refund; a fee waiver; a lower mortgage rate; a loyalty bonus",
                "say yes and sign this week; send the form today; take the offer in full; give the bank your name now",
            ),
        ),
    ),
    "sports": (
        "your body",
        "a coach",
        (
            (
                "a steep climb; a deep dive; a night ski run; a big wave; a cliff jump",
                "check the gear twice; go with a partner; wear the helmet and the rope; "
                "turn back when the weather changes",
            ),
            (
                "a garden stroll; a table tennis game; a park jog; a yoga class; a slow swim",
                "leave the gear at home; go alone and enjoy it; go without the helmet; keep going in any weather",
            ),
            (
                "a long race; a heavy lift; a sprint test; a football match; a tennis final",
                "warm up slowly; eat a good meal before it; build up over several weeks; "
                "train with more weight each time",
            ),
            (
                "a pulled muscle; a sore hamstring; a strained hip; a second injury; a worn out ankle joint",
                "cool down and stop; eat well and sleep more; take several weeks off; train with no weight at all",
            ),
        ),
    ),
    "cooking": (
        "your meal",
        "a chef",
        (
            (
                "a raw chicken; a minced pork pie; a frozen fish; a stuffed turkey; a wild mushroom",
                "cook it through at high heat; keep it apart from the salad; scrub the board after it; serve it hot",
            ),
            (
                "a basil leaf; a ripe peach; a soft cheese; a cucumber; a bowl of cream",
                "leave it raw; add it to the salad; cut it on the board with the rest; serve it cold",
            ),
            (
                "a beef stew; a bean soup; a bread dough; a bone broth; an onion sauce",
                "give it several hours; keep the flame low; leave the lid on it; begin the day before",
            ),
            (
                "a thin steak; a garlic shrimp; a stir fry; a scrambled egg; a pancake",
                "give it a few minutes; keep the flame high; take the lid off; begin just before the meal",
            ),
        ),
    ),
    "gardening": (
        "your garden",
        "a gardener",
        (
            (
                "a cactus; a lavender pot; a rosemary bush; an aloe plant; a thyme bed",
                "water it once a month; give it full sun; use dry sandy soil; let the pot dry out",
            ),
            (
                "a fern; a moss bed; a water lily; a mint plant; a willow cutting",
                "water it every day; give it deep shade; use rich wet soil; let the pot stay moist",
            ),
            (
                "a rose bush; an apple tree; a grape vine; a wild hedge; a blackberry cane",
                "cut it back in winter; remove the old wood; tie it to a frame; thin out the branches",
            ),
            (
                "a young seedling; a new graft; a magnolia; a lemon tree; a palm sprout",
                "leave it uncut in winter; cover the old wood with straw; let it grow freely; keep all of the branches",
            ),
        ),
    ),
    "driving": (
        "your safety",
        "a mechanic",
        (
            (
                "an icy bridge; a foggy road; a wet curve; a school street; a gravel path",
                "slow down early; keep a long distance; brake gently; stay in the low gear",
            ),
            (
                "a motorway entry; an overtaking lane; an uphill stretch; a highway ramp; a merging lane",
                "speed up early; keep up with the flow; press the pedal firmly; move to the high gear",
            ),
            (
                "a red oil light; a flat tyre; a smoking engine; a squealing brake; a loose wheel",
                "pull over at once; switch off the engine; call for a tow; leave the car where it is",
            ),
            (
                "a cold engine; a dusty hood; a weak battery; a new tyre smell; a clicking blinker",
                "drive on as normal; let the engine run; call for a service next month; bring the car home",
            ),
        ),
    ),
    "travel": (
        "your trip",
        "a guide",
        (
            (
                "a desert tour; a beach week; a jungle walk; a tropical island; a summer safari",
                "pack thin clothes; set out at dawn; carry cold water; sit in the shade at noon",
            ),
            (
                "an arctic cruise; a winter hike; a ski village; a snow lodge; a glacier visit",
                "pack thick clothes; set out at noon; carry a hot flask; stay in the sun and keep moving",
            ),
            (
                "a crowded station; a night bus; a busy market; a cheap hostel; a dark alley",
                "keep the bag closed; hide the cash; hold on to the passport; give short answers to strangers",
            ),
            (
                "a border check; a customs line; an airport gate; an embassy desk; a visa office",
                "keep the bag open; show the cash; hand over the passport; give full answers to everyone",
            ),
        ),
    ),
    "pets": (
        "your pet",
        "a vet",
        (
            (
                "a scared kitten; a rescue dog; a shy rabbit; a nervous parrot; a trembling hamster",
                "give it a quiet corner; speak softly to it; let it come to you; keep visitors away from it",
            ),
            (
                "a bored puppy; a lazy cat; a playful collie; a lonely budgie; a wild ferret",
                "give it a busy day; play loud games with it; take it out to meet others; bring visitors to it",
            ),
            (
                "a thin stray; a nursing cat; a growing foal; a weak lamb; a hungry duckling",
                "feed it five times a day; fill the bowl to the top; add fat to the food; offer a snack at night",
            ),
            (
                "an overweight cat; a spoiled pug; a round pony; a greedy goldfish; a heavy bulldog",
                "feed it once a day; leave the bowl half empty; cut fat from the food; lock the snacks away",
            ),
        ),
    ),
    "home": (
        "your house",
        "an electrician",
        (
            (
                "a sparking socket; a buzzing switch; a wet lamp; a broken fuse; a scorched cable",
                "turn off the power first; keep your hands away from it; unplug it tonight; leave the cover shut",
            ),
            (
                "a smoke detector; an alarm panel; a basement pump; a freezer; a night light",
                "leave the power on; test it by hand each week; plug it in tonight; lift the cover and look inside",
            ),
            (
                "a mouldy wall; a damp cellar; a steamy bathroom; a musty closet; a wet attic",
                "open the shutters wide; run the fan all day; let the air in; pull the furniture from the wall",
            ),
            (
                "a drafty window; a cold hallway; a leaking door; a chilly nursery; a windy porch",
                "seal the shutters with tape; keep the fan off; keep the air out; push the furniture to the wall",
            ),
        ),
    ),
    "computing": (
        "your data",
        "a technician",
        (
            (
                "a strange email; a popup window; an unknown link; a fake prize; a free download",
                "delete it unread; close it at once; block the sender; keep the password secret",
            ),
            (
                "a school invitation; a team calendar; a shared report; a payslip message; a class survey",
                "open it and reply; click through to the end; add the sender; enter the password",
            ),
            (
                "a thesis file; a photo album; a client database; a family video; a contract folder",
                "make two copies of it; save it every hour; store it in another place; keep the old version",
            ),
            (
                "a full cache; an old log; a temporary folder; a duplicate image; a junk archive",
                "remove all copies of it; clear it every week; store it nowhere; drop the old version",
            ),
        ),
    ),
    "careers": (
        "your career",
        "a mentor",
        (
            (
                "a job interview; a salary talk; a panel meeting; a board hearing; a formal review",
                "prepare it the night before; arrive ten minutes early; dress with care; listen before you talk",
            ),
            (
                "an office party; a team lunch; a coffee chat; a farewell drink; a summer outing",
                "prepare nothing for it; arrive whenever you like; dress for comfort; talk as much as you want",
            ),
            (
                "an unpaid shift; a rude manager; a stolen idea; an unfair warning; an unsafe ladder",
                "write it down with dates; report it to the office; ask for a meeting; stand your ground",
            ),
            (
                "a lost pen; a small typo; a noisy printer; a crooked poster; a spilled coffee",
                "laugh about it; mention it to no one; ask for nothing; move on with the day",
            ),
        ),
    ),
    "study": (
        "your progress",
        "a teacher",
        (
            (
                "a spelling list; a piano scale; a times table; a foreign alphabet; a word game",
                "repeat it every morning; say it aloud; learn it by heart; practise with the book shut",
            ),
            (
                "a physics proof; a long novel; a history debate; a philosophy essay; an abstract painting",
                "read it once with care; think in silence; ask why it is so; work with the book open",
            ),
            (
                "a final exam; a term paper; a group project; a science fair; a scholarship form",
                "start weeks before; split it into parts; write a plan; use all of the time to revise",
            ),
            (
                "a pop quiz; a warm up puzzle; a one line reply; a quick poll; a class vote",
                "start right away; do it in one go; trust your first answer; finish without a second look",
            ),
        ),
    ),
}


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(";"))


def _build() -> dict[str, Domain]:
    return {
        name: Domain(
            name,
            stake,
            expert,
            tuple(Category(name, i, _split(topics), _split(remedies)) for i, (topics, remedies) in enumerate(rows)),
        )
        for name, (stake, expert, rows) in _TABLE.items()
    }


DOMAINS: dict[str, Domain] = _build()
"""The twelve, by name."""
