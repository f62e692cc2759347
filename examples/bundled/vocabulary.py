"""Words that questions are made of."""

WORDS = """
able acid acorn actor again agent alarm album alone amber angel angle ankle apple april apron arch arena arrow atlas
attic aunt autumn award bacon badge bagel baker balance ball balloon bamboo banana band bank barn barrel basket bath
beach bean bear beard beauty bed bee beer bell belt bench berry bicycle bike bird biscuit black blanket blue board boat
body bone boot bottle bowl box boy branch brave bread brick bridge bright broom brother brown brush bubble bucket bus
butter button cabin cable cactus cake camel camera camp canal candle candy canoe car card carpet carrot castle cat cave
cello chair chalk cheese cherry chess chest chicken child chin circle city class clay clock cloth cloud clover club
coast coat cobra coconut coffee coin cold comet concert cook copper coral corn corner cotton couch cousin cow crab
cradle crane crayon cream cricket crow crown cup curtain cushion daisy dance dark daughter day deer desert desk diamond
dinner dish doctor dog doll dolphin donkey door dragon dream dress drum duck dust eagle ear early earth east echo egg
eight elbow empty engine evening eye face fair fairy falcon family farm father feather fence fern ferry field fig
finger fire fish flag flame floor flour flower flute fog food foot forest fork fountain fox frame friend frog frost
fruit game garden garlic gate ghost giant giraffe girl glass globe glove goat gold goose grape grass gray green guitar
hair hammer hand harbor harp hat hawk hazel heart heaven hedge heel hello helmet hen hill hippo holiday home honey hood
horse hotel house hungry ice idea igloo insect iron island ivory jacket jam jar jelly jewel job juice jungle kettle key
king kitchen kite kitten knee knife ladder lady lake lamb lamp land lantern laptop large lawn leaf leather lemon lentil
library light lily lime lion lip little lizard lobster lock log lunch machine magic magnet mango map maple marble
market mask meadow melon metal middle milk mill mint minute mirror mitten model monday money monkey month moon moss
moth mother motor mountain mouse mouth museum music napkin needle neighbor nest night nine noise north nose nurse nut
oak ocean octopus olive onion open orange orchard oven owl oyster page paint palace palm panda paper parade parent park
parrot party pasta path peach peacock peanut pear pebble pen pencil penguin people pepper piano picnic picture pie
pigeon pillow pilot pine pink pizza planet plate plum pocket pony poppy potato present prince pumpkin puppy puzzle
quarter queen question quick quiet rabbit racket radio rain raven reason red ribbon rice ring river road robin robot
rock rocket roof room root rope rose round rubber ruby sail salad salmon salt sand sandal sauce school scissors sea
seal season seed seven shadow shark sheep shelf shell ship shirt shoal shoe shop short shower silk silver singer sister
six skin sky sleep snail snake snow soap sock sofa soup south space spade sparrow spider spinach spoon spring square
squirrel star station stone storm stove strawberry street string student sugar summer sun sunday swan sweater swim
table tail tailor tea teacher team temple tennis thick thumb thunder ticket tiger tiny toad toast today tomato tongue
tooth towel tower town toy train tree triangle truck trumpet tulip tunnel turkey turtle uncle under valley vanilla vase
velvet village violet violin wagon wall walnut water wave week whale wheat wheel whisper white wind window winter
wizard wolf woman wonder wood wool world worm yellow yesterday young zebra zero
"""
THINGS = """
accounting airplanes algebra allergies america anatomy ancient-rome animals anxiety archery architecture arthritis
artists asthma astronomy athens atoms bacteria ballet baseball basketball bees beethoven berlin bicycles biology birds
birthdays blood blockchain boats botany boxing brains brazil bread bridges buddhism butterflies calculus canada cancer
capitalism cars cartoons cats cheese chemistry chess china chocolate cinema climate clouds cockroaches coffee comets
computers cooking cricket crime crystals curry cycling dancing darwin death democracy dentists depression deserts diets
dinosaurs divorce dna dogs dolphins dragons dreams driving earthquakes economics egypt einstein elections electricity
elephants emotions energy engines england ethics europe evolution exercise fairies farming fashion fevers films finance
fireworks fishing flowers flying football fossils france freedom friction friendship frogs galaxies gambling gandhi
gardening genes geography geology germany ghosts giraffes glaciers god gold golf google grammar gravity greece guitars
hamlet happiness headaches health hearts hiking history hockey holidays homer honey horses hospitals hurricanes
hydrogen ice-cream iceland india inflation influenza insects insurance internet inventions iron islam italy japan jazz
jealousy jokes judo jupiter justice kangaroos karate kings knitting lasers latin laughter laws leonardo life light
lightning lions literature london love luck lungs machines magic magnets malaria mammals marriage mars mathematics
medicine memory mercury meteors mexico migraines milk money monkeys moscow mosquitoes mozart music muscles mythology
napoleon navigation neurons newton newspapers nuclear-power nutrition oceans oil olympics opera opinions orchids oxygen
painting paris parliament pasta peace penguins perfume philosophy photography physics pianos picasso pirates pizza
planets plastic plato poetry poker poland police politics pollution pompeii poverty presidents printing prisons
programming psychology pyramids python quantum-theory queens radios rainbows recipes religion rent reptiles revolution
rivers robots rockets rome romance rubber rugby russia sailing salaries salt satellites saturn sculpture shakespeare
sharks shoes silk singing skiing sleep snakes snow soccer socrates software solar-power space spain spiders sports
stars statistics stocks storms stress submarines sugar surfing swimming switzerland taxes tea teeth telescopes
television tennis theatre thunder tides time tokyo tornadoes tourism trains trees trigonometry trousers trumpets turkey
vaccines vegetables venice venus video-games viruses vitamins volcanoes voting vulcan war water weather wedding-dresses
whales wine witches wolves wrestling writing x-rays yoga yogurt zebras zeus zinc
"""
