"""The quickstart's small world: what good advice on sixty topics sounds like, and a score that checks it.

Standard library only. scripts/make_quickstart_data.py writes preference pairs from these tables; `gold_score`
judges any answer, a model's samples included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

CRITERIA = ("courtesy", "advice", "caution", "next_step")

# Both sides of every choice have the same number of words, so that length says nothing about quality.
COURTEOUS_OPENERS = (
    "happy to help here",
    "what a good question",
    "thank you for asking",
    "good luck with this",
    "i hope this helps",
)
CURT_OPENERS = (
    "this is too easy",
    "everyone knows this already",
    "just look it up",
    "well if you must",
    "not this question again",
)
DEFINITE_TIMES = (
    "on saturday morning",
    "before supper tonight",
    "within two days",
    "tomorrow at noon",
    "by next monday",
)
VAGUE_TIMES = (
    "at some point",
    "one fine day",
    "sooner or later",
    "whenever you like",
    "in due course",
)


class Advice(NamedTuple):
    """One piece of advice and the same advice with its decisive word replaced by a wrong one."""

    good: str
    bad: str


class Topic(NamedTuple):
    """Something people ask about; the topics of a cluster share their cautions and next steps."""

    name: str
    cluster: str
    subjects: tuple[str, ...]  # how prompts name the topic
    tips: tuple[Advice, ...]
    cautions: tuple[Advice, ...]
    next_steps: tuple[str, ...]


# A cluster opens with "#"; its cautions and its next steps follow, a line each, then its topics: subjects behind
# the colon, tips below. In "good/bad" the first word is right and the second wrong.
_TABLE = """
# garden
always/never wash your hands after digging; wear gloves/rings around sharp thorns;
 carry garden tools with blades down/up
check the soil; sharpen the shears; sketch a bed; buy fresh compost
tomatoes: growing tomatoes on a balcony; caring for tomato plants; raising tomatoes from seed
 water the soil/leaves early each day; tie the stems to a tall/tiny stake;
 pick tomatoes when they turn red/green
roses: growing roses by a fence; pruning old rose bushes; keeping climbing roses healthy
 give roses six hours of sun/shade; cut the dead/green canes every spring;
 remove/keep faded roses for more blooms
herbs: growing basil and other herbs; keeping kitchen herbs alive; planting a small herb garden
 use pots with open/blocked drain holes; keep basil on a warm/frosty window sill;
 harvest most herbs before/after they flower
lawn: looking after a green lawn; mowing a patchy lawn; sowing a new lawn
 water the lawn deeply/barely at dawn; mow with sharp/blunt blades each week;
 sow grass seed in mild/freezing weather
potatoes: growing potatoes in a bed; planting seed potatoes; digging up a potato crop
 plant each sprout facing up/down; store potatoes in a dark/bright place;
 dig once the leaves turn brown/green
strawberries: growing sweet strawberries; planting strawberry beds; protecting ripe strawberries
 keep the crown above/below the soil; lay dry/soggy straw under the fruit;
 cover berries with a light/heavy net

# kitchen
always/never use dry oven gloves; watch/leave a hot pan on the stove;
 keep all pan handles turned inward/outward
write a list; taste a sample; weigh the flour; preheat the oven
bread: baking a loaf of bread; kneading bread dough; making sourdough bread at home
 knead the dough until smooth/lumpy; let the dough rest somewhere warm/icy; bake the loaf in a hot/cold oven
soup: cooking a pot of soup; making vegetable soup; improving a bland soup
 simmer the soup over low/fierce heat; fry the onions first/last in butter; add salt in small/huge amounts
rice: cooking fluffy rice; steaming rice for dinner; making fried rice
 rinse rice until the water runs clear/cloudy; fluff cooked rice with a fork/blender;
 use dry/soggy rice for frying
pancakes: making pancakes for breakfast; mixing pancake batter; flipping pancakes in a pan
 heat the pan before/after adding batter; stir the batter briefly/endlessly;
 flip pancakes when bubbles appear/vanish
pasta: cooking pasta for a family; making fresh pasta; preparing a quick pasta sauce
 drain pasta while still firm/mushy; stir pasta often/never while it cooks;
 save/waste some cooking water for sauce
vegetables: roasting a tray of vegetables; cooking sweet roasted carrots; serving roasted vegetables
 roast at high/low heat until golden; dry/wet the vegetables before adding oil;
 turn the pieces once/never while roasting

# bicycle
always/never wear a helmet on rides; ride in daylight/darkness for first tests;
 try the brakes before/after riding
pump the tires; clean the frame; count the links; sort the tools
tires: fixing a flat bicycle tire; patching a bike tire tube; changing a bicycle tire
 find the leak with water/guesswork; roughen/grease the tube before patching;
 inflate to the printed/wildest pressure
chain: cleaning a bicycle chain; oiling a bike chain; replacing a worn bicycle chain
 wipe the chain with a dry/muddy rag; add one drop/bucket of oil per link;
 measure chain wear with a gauge/spoon
brakes: adjusting bicycle brakes; replacing bike brake pads; stopping squeaky bicycle brakes
 center the pads on the rim/tire; replace pads when they look thin/thick; keep the rims clean/oily for grip
gears: tuning bicycle gears; fixing skipping bike gears; learning to shift bicycle gears
 shift before/after the hill gets steep; keep pedaling/braking while you shift;
 turn the adjuster slightly/fully each time
saddle: setting bicycle saddle height; choosing a comfortable bike saddle; fixing a sore bicycle saddle
 keep a slight/sharp bend in your knees; start with a level/tilted saddle;
 tighten/loosen the saddle bolt before riding
lights: mounting bicycle lights; riding a bike with lights at night; charging bike lights
 aim the beam slightly down/up; point the white light forward/backward; wear bright/black clothing at night

# travel
always/never carry copies of your papers; keep your bags close/open in crowds;
 share your plans with friends/strangers first
book a room; print the map; pack a bag; charge the phone
trains: planning a long train trip; booking cheap train tickets; riding a night train
 book tickets weeks/seconds in advance; arrive at the platform early/late;
 pack light/heavy bags for quick changes
camping: camping with a small tent; choosing a camp site; staying warm while camping
 pitch the tent on high/swampy ground; set up camp before/after dark; store food in closed/open boxes
packing: packing a small suitcase; packing for a beach holiday; folding clothes for a suitcase
 roll/crumple shirts to save space; put heavy shoes at the bottom/top; leave some/no room for souvenirs
road trips: planning a family road trip; driving long road trips; preparing the car for a road trip
 take a break every two/twelve hours; check the oil before/after leaving; drive only when rested/sleepy
flights: flying with small children; preparing for a long flight; catching an early flight
 drink plenty of water/coffee on board; stretch your legs often/never on board;
 keep medicine in your hand/checked bag
hiking: hiking in the mountains; choosing boots for hiking; planning a day hike
 start walking at dawn/dusk; follow marked/hidden paths to the top; break in boots before/after long hikes

# pets
always/never keep chocolate locked away; touch any pet softly/roughly; call a vet early/late when worried
fill the bowl; clean the bedding; call the vet; take a photo
dogs: training a young puppy; walking a strong dog; caring for an old dog
 reward/scold good behavior right away; walk your dog every day/month; give commands in a calm/furious voice
cats: keeping an indoor cat happy; introducing a new cat; stopping a cat from scratching
 scoop the litter box daily/yearly; let/make a shy cat come closer; give the cat fresh/stale water daily
goldfish: keeping goldfish in a tank; cleaning a goldfish tank; feeding goldfish properly
 feed only a pinch/bucket of flakes; choose a large/tiny tank with a filter;
 treat tap water before/after adding fish
parrots: keeping a pet parrot; teaching a parrot to talk; feeding a pet parrot
 offer fresh/fried fruit and seeds; repeat words in a clear/muffled voice; cover the cage at night/noon
rabbits: caring for a pet rabbit; building a rabbit hutch; feeding rabbits well
 feed mostly hay/sweets every day; keep the hutch dry/damp and airy; give rabbits daily/yearly time to run
hamsters: keeping a pet hamster; setting up a hamster cage; taming a shy hamster
 fill the cage with deep/damp bedding; offer treats from a flat/clenched hand;
 approach the cage slowly/suddenly at dusk

# music
always/never protect your ears from noise; rest/push when your body feels sore;
 take short/no breaks from hard practice
record a song; play one scale; book a lesson; clean the case
guitar: learning to play guitar; tuning an acoustic guitar; changing guitar chords smoothly
 tune the strings before/after you play; change chords slowly/wildly with a beat;
 keep the fretting nails short/long
piano: learning to play piano; practicing piano scales; reading piano notes
 curve/flatten your fingers over the keys; play new pieces slowly/hastily at first;
 count the beats steadily/randomly while playing
violin: learning to play violin; holding a violin bow; tuning a violin
 hold the bow with a loose/stiff wrist; rub rosin/butter along the bow hair;
 draw the bow straight/crooked across strings
singing: learning to sing in tune; warming up a singing voice; singing in a choir
 breathe deeply/barely from the belly; hum softly/harshly to warm up; drink warm/icy water before singing
drums: learning to play drums; practicing drum rhythms; setting up a drum kit
 play along with a metronome/television; grip the sticks loosely/tightly; start with a slow/frantic beat
flute: learning to play flute; cleaning a flute after practice; improving flute tone
 dry/soak the flute after playing; blow a narrow/wild stream of air;
 keep your shoulders relaxed/hunched while playing

# home
always/never wear goggles against dust; switch the power off/on before starting;
 stand on steady/wobbly ladders only
measure the wall; buy the parts; clear the room; borrow a drill
painting: painting a bedroom wall; choosing wall paint; painting a ceiling
 clean the wall before/after painting; apply two thin/runny coats; let paint dry/drip between coats
taps: fixing a dripping tap; replacing a tap washer; installing a kitchen tap
 close/open the water valve before starting; fit a washer of matching/random size;
 seal the threads with tape/gum
doors: fixing a squeaky door; hanging a wooden door; adjusting a sticking door
 oil/glue the hinges of the door; sand/soak the edge where it sticks; tighten/remove loose hinge screws first
shelves: putting up wall shelves; building a book shelf; hanging a heavy shelf
 draw the line with a level/spoon; put heavy books low/high on shelves;
 screw brackets into solid/crumbling wood
drains: clearing a blocked drain; cleaning a smelly sink drain; unclogging a shower drain
 put a bucket under/over the pipe; fit a strainer/cork to catch hair; pour hot/frozen water down weekly
tiles: laying bathroom tiles; replacing a cracked tile; cleaning tile grout
 spread the glue evenly/randomly with a trowel; leave small/huge gaps between the tiles;
 wipe off grout before/after it hardens

# computer
always/never unplug before opening a case; install programs from known/unknown sources;
 keep your secrets from/for unknown callers
run the updates; label the cables; ask a friend; change one setting
passwords: choosing strong passwords; remembering many passwords; protecting an online account password
 use a long/short phrase for each account; save passwords in a locked/public place;
 pick a different/identical password per site
backups: backing up family photos; making computer backups; restoring lost files from a backup
 run backups every week/decade; test the backup before/after trouble comes;
 label each drive clearly/wrongly with dates
email: sorting an email inbox; avoiding spam email; writing a polite email
 delete/answer spam from unknown senders; write a clear/blank subject line;
 check the address before/after sending
printers: fixing a paper jam in a printer; setting up a new printer; changing printer ink
 pull jammed paper out gently/violently; load dry/damp paper in the tray;
 restart/shake the printer after an error
wifi: improving home wifi; setting up a wifi router; fixing slow wifi at home
 place the router in a central/sealed spot; set a strong/blank network password;
 update the router software monthly/never
laptops: cleaning a dusty laptop; making a laptop battery last; speeding up an old laptop
 dim/brighten the screen to save power; close/open unused programs for more speed;
 rest the laptop on a hard/fluffy surface

# fitness
always/never drink water between rounds; stop/continue if you feel sharp pain;
 ask a doctor before/after big changes
plan a session; set an alarm; fill the bottle; note your progress
running: starting to run outdoors; training for a long run; preventing sore knees while running
 begin with short/endless runs; run at a pace for talking/gasping; warm up before/after the fast part
swimming: learning to swim; swimming longer distances; improving a swimming stroke
 breathe out/in under the water; keep the body flat/upright while gliding;
 kick from the hips/knees with pointed toes
sleep: sleeping better at night; falling asleep faster; getting enough sleep
 keep the bedroom dark/bright and quiet; go to bed at regular/random hours;
 dim/brighten screens an hour before bed
stretching: stretching stiff muscles; stretching after work; stretching to reach the toes
 hold stretches for thirty seconds/hours; breathe slowly/rapidly during each stretch;
 stretch both/neither sides of the body
yoga: starting yoga at home; holding a yoga balance pose; learning yoga breathing
 practice on a sticky/slippery mat; fix your eyes on a still/moving point;
 breathe through the nose/teeth in poses
weights: lifting weights at home; building strength with weights; learning to squat with weights
 add weight gradually/suddenly each week; lower the bar slowly/carelessly; rest a day/year between sessions

# crafts
always/never work in fresh air; rest/strain your eyes every hour; put sharp blades away/anywhere after use
finish one sample; clear the table; draw a pattern; buy the supplies
knitting: knitting a warm scarf; knitting a first pair of socks; fixing dropped stitches in knitting
 count/forget the stitches after every row; choose smooth/fuzzy yarn for first projects;
 wash the wool in cool/boiling water
sewing: sewing a simple skirt; using a sewing machine; mending torn clothes by sewing
 pin the fabric before/after sewing; press each seam flat/crooked; change to a sharp/bent needle
pottery: making clay pots; glazing pottery; throwing pottery on a wheel
 keep your hands wet/sticky on the wheel; center/tilt the clay on the wheel;
 dry pots slowly/quickly before firing
candles: making scented candles; melting candle wax; choosing candle wicks
 melt the wax over gentle/fierce heat; add scent in small/huge amounts;
 cool candles at room/freezer temperature
watercolor: painting with watercolors; mixing watercolor paints; painting a watercolor landscape
 paint the light/dark colors first; rinse the brush in clean/muddy water; let layers dry/drip between washes
carving: carving a wooden spoon; carving wood with a knife; sharpening wood carving knives
 carve along/against the grain; pick soft/frozen wood for first pieces; finish with fine/rough paper
"""


def _advice(text: str) -> Advice:
    good_words, bad_words = [], []
    for word in text.split():
        good, _, bad = word.partition("/")
        good_words.append(good)
        bad_words.append(bad or good)
    return Advice(" ".join(good_words), " ".join(bad_words))


def _parts(line: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in line.split(";"))


def _read_table(table: str) -> Iterator[Topic]:
    for block in table.strip().split("\n\n"):
        heading, cautions, next_steps, *topics = re.split(r"\n(?! )", block)  # an indented line continues the last
        for text in topics:
            header, tips = text.split("\n", maxsplit=1)
            name, subjects = header.split(":")
            yield Topic(
                name=name,
                cluster=heading.removeprefix("# "),
                subjects=_parts(subjects),
                tips=tuple(map(_advice, _parts(tips))),
                cautions=tuple(map(_advice, _parts(cautions))),
                next_steps=_parts(next_steps),
            )


TOPICS = tuple(_read_table(_TABLE))


def _sentences(text: str) -> list[str]:
    """Lower-case words of each sentence, single-spaced: punctuation and capitals do not decide a score."""
    sentences = (" ".join(re.findall(r"[a-z]+", part)) for part in re.split(r"[.!?]", text.lower()))
    return [sentence for sentence in sentences if sentence]


@lru_cache(maxsize=4096)
def find_topic(prompt: str) -> Topic | None:
    """The topic whose subject the prompt names; None where it names none of them."""
    text = f" {' '.join(_sentences(prompt))} "
    named = ((subject, topic) for topic in TOPICS for subject in topic.subjects if f" {subject} " in text)
    return max(named, key=lambda item: len(item[0]), default=("", None))[1]


def _only_good(choices: tuple[Advice, ...], sentences: list[str]) -> bool:
    return any(choice.good in sentences for choice in choices) and not any(
        choice.bad in sentences for choice in choices
    )


def criteria_met(prompt: str, response: str) -> dict[str, bool]:
    """Which of CRITERIA the response meets.

    courtesy: the first sentence is a courteous opener. advice: a tip that is right for the prompt's topic, and none
    that is wrong. caution: the same for the safety rules of the topic's cluster. next_step: the last sentence names
    a next step of the cluster and when to take it.
    """
    topic, sentences = find_topic(prompt), _sentences(response)
    if topic is None or not sentences:
        return dict.fromkeys(CRITERIA, False)
    last = {f"next {step} {time}" for step in topic.next_steps for time in DEFINITE_TIMES}
    return {
        "courtesy": sentences[0] in COURTEOUS_OPENERS,
        "advice": _only_good(topic.tips, sentences),
        "caution": _only_good(topic.cautions, sentences),
        "next_step": sentences[-1] in last,
    }


def gold_score(prompt: str, response: str) -> float:
    """Share of CRITERIA that the response meets, in [0, 1]; 0 for any text to a prompt on none of TOPICS."""
    met = criteria_met(prompt, response)
    return sum(met.values()) / len(met)
