"""Words of the sample shop, in English and Chinese: departments, brands, series, and shelves of goods in the order people buy them."""

from typing import NamedTuple


class Name(NamedTuple):
    """A name in both languages."""

    en: str
    zh: str


class Good(NamedTuple):
    """A kind of thing and its usual price in US dollars."""

    en: str
    zh: str
    price: float


class Shelf(NamedTuple):
    """A sub-category. Each good is most often followed by the next ones in the list (kettle, dripper, filters)."""

    name: Name
    goods: tuple[Good, ...]


class Department(NamedTuple):
    """A category: its brands go from cheap to dear."""

    name: Name
    brands: tuple[Name, Name, Name]
    shelves: tuple[Shelf, ...]


def _shelf(en: str, zh: str, goods: str) -> Shelf:
    """Reads goods written as ``english|chinese|price`` and separated by semicolons."""
    parts = (good.strip().split("|") for good in goods.split(";"))
    return Shelf(Name(en, zh), tuple(Good(name, chinese, float(price)) for name, chinese, price in parts))


DEPARTMENTS = (
    Department(
        Name("kitchen", "厨房"),
        (Name("Dailyware", "日用家"), Name("Harrow & Lane", "禾澜"), Name("Maison Orval", "奥瓦尔")),
        (
            _shelf(
                "coffee",
                "咖啡",
                """gooseneck kettle|细口手冲壶|42; pour-over dripper|手冲滤杯|24; paper filters, 100 pack|咖啡滤纸 100 张|8;
                single-origin coffee beans 500 g|单品咖啡豆 500 克|19; burr coffee grinder|磨豆机|68;
                brewing scale with timer|计时咖啡秤|35;
                glass coffee server|玻璃分享壶|27; milk frother|奶泡机|30; double-wall espresso cups, set of 2|双层浓缩杯 2 只|22""",
            ),
            _shelf(
                "cookware",
                "锅具",
                """non-stick frying pan 28 cm|不粘煎锅 28 厘米|39; glass pan lid|玻璃锅盖|14; silicone spatula set|硅胶锅铲套装|16;
                cast-iron casserole|铸铁炖锅|95; saucepan with spout|导流奶锅|34; stainless steel stockpot|不锈钢汤锅|58;
                bamboo steamer basket|竹蒸笼|21; pan protectors, set of 3|锅具保护垫 3 片|11; oven gloves|防烫手套|13""",
            ),
            _shelf(
                "baking",
                "烘焙",
                """stand mixer|厨师机|189; mixing bowl set|搅拌盆套装|28; digital kitchen scale|厨房电子秤|23; measuring spoons|量匙|9;
                loaf tin|吐司模具|15; proofing basket|发酵藤篮|18; springform cake tin|活底蛋糕模|20;
                piping bag and nozzles|裱花袋与花嘴|14;
                cooling rack|蛋糕冷却架|12""",
            ),
        ),
    ),
    Department(
        Name("garden", "园艺"),
        (Name("Greenpatch", "绿田"), Name("Fernhill", "蕨山"), Name("Hortus Atelier", "霍图斯")),
        (
            _shelf(
                "planting",
                "种植",
                """seed starting tray|育苗盘|15; tomato seeds, heirloom mix|番茄种子|6; peat-free potting soil 20 l|无泥炭营养土 20 升|13;
                plant labels, 50 pack|植物标签 50 个|7; terracotta pot 24 cm|红陶花盆 24 厘米|17; bamboo plant stakes|竹支柱|9;
                liquid tomato feed|番茄液体肥|11; self-watering planter|自动浇水花箱|36; frost protection fleece|防霜保温布|16""",
            ),
            _shelf(
                "tools",
                "工具",
                """hand trowel|手铲|14; bypass pruning shears|修枝剪|29; leather gardening gloves|园艺皮手套|19; kneeling pad|护膝垫|12;
                garden fork|花园叉|44; expanding hose 15 m|伸缩水管 15 米|37; spray nozzle|喷水枪|15; hose reel|水管卷盘|55;
                folding wheelbarrow|折叠手推车|89""",
            ),
            _shelf(
                "barbecue",
                "烧烤",
                """kettle charcoal grill|圆形木炭烤炉|129; lumpwood charcoal 5 kg|果木炭 5 公斤|15; chimney starter|引火桶|25;
                long-handled tongs|长柄烤夹|17; instant-read meat thermometer|食品温度计|28; cast-iron grill plate|铸铁烤盘|39;
                smoking wood chips|烟熏木屑|10; grill cleaning brush|烤网清洁刷|13; weatherproof grill cover|烤炉防雨罩|32""",
            ),
        ),
    ),
    Department(
        Name("sport", "运动"),
        (Name("Stridewell", "迈步"), Name("Kestrel", "赤隼"), Name("Velora", "维洛")),
        (
            _shelf(
                "running",
                "跑步",
                """cushioned running shoes|缓震跑鞋|98; running socks, 3 pairs|跑步袜 3 双|18; breathable running shirt|透气跑步衫|32;
                GPS running watch|跑步手表|179; phone armband|手机臂包|16; hydration belt|水壶腰带|29; reflective vest|反光背心|21;
                energy gels, box of 12|能量胶 12 支|24; foam roller|泡沫轴|27""",
            ),
            _shelf(
                "yoga",
                "瑜伽",
                """natural rubber yoga mat|天然橡胶瑜伽垫|55; cork yoga blocks, pair|软木瑜伽砖 2 块|23; cotton yoga strap|棉质伸展带|12;
                mat carrying bag|瑜伽垫背包|26; high-waist leggings|高腰瑜伽裤|48; meditation cushion|冥想坐垫|39;
                lavender eye pillow|薰衣草眼枕|17; yoga wheel|瑜伽轮|36; microfibre mat towel|瑜伽铺巾|25""",
            ),
            _shelf(
                "cycling",
                "骑行",
                """road bike helmet|公路车头盔|79; rechargeable bike light set|充电车灯套装|38; cycling gloves|骑行手套|24;
                bib shorts|背带骑行裤|69; mini bike pump|便携打气筒|26; saddle bag|鞍座包|22; inner tubes, pack of 2|内胎 2 条|14;
                chain lubricant|链条油|11; folding multi-tool|折叠工具|28""",
            ),
        ),
    ),
    Department(
        Name("outdoors", "户外"),
        (Name("Basecamp Basics", "营地"), Name("Northfell", "北岭"), Name("Alpenwild", "阿尔野")),
        (
            _shelf(
                "camping",
                "露营",
                """two-person tent|双人帐篷|159; tent footprint|帐篷地布|29; down sleeping bag|羽绒睡袋|139;
                inflatable sleeping pad|充气睡垫|75;
                camping pillow|露营枕|22; LED camping lantern|露营灯|33; gas camping stove|气炉|46; titanium cooking pot|钛锅|52;
                folding camp chair|折叠露营椅|41""",
            ),
            _shelf(
                "hiking",
                "徒步",
                """waterproof hiking boots|防水徒步靴|145; merino hiking socks|美利奴徒步袜|21; trekking poles, pair|登山杖 2 支|64;
                30-litre daypack|30 升双肩包|88; rain cover for backpack|背包防雨罩|17; water filter bottle|滤水壶|42;
                hooded rain jacket|连帽冲锋衣|119; head torch|头灯|36; first-aid kit|急救包|25""",
            ),
            _shelf(
                "fishing",
                "垂钓",
                """spinning rod|路亚竿|72; spinning reel|纺车轮|66; braided line 150 m|编织线 150 米|19; lure assortment box|路亚饵套装|27;
                landing net|抄网|34; tackle bag|钓具包|49; long-nose pliers|长嘴钳|18; polarised sunglasses|偏光太阳镜|57;
                folding fishing stool|折叠钓椅|31""",
            ),
        ),
    ),
    Department(
        Name("electronics", "数码"),
        (Name("Plusline", "普乐"), Name("Auralis", "奥澜"), Name("Nordkraft", "诺卡")),
        (
            _shelf(
                "audio",
                "音频",
                """wireless earbuds|无线耳机|89; earbud charging case cover|耳机保护套|13; memory foam ear tips|记忆棉耳塞套|16;
                over-ear headphones|头戴式耳机|169; headphone stand|耳机支架|25; portable bluetooth speaker|便携蓝牙音箱|79;
                turntable|黑胶唱机|219; record cleaning kit|唱片清洁套装|21; bookshelf speakers, pair|书架音箱 1 对|249""",
            ),
            _shelf(
                "photography",
                "摄影",
                """mirrorless camera body|微单机身|799; 35 mm prime lens|35 毫米定焦镜头|349; UV filter 52 mm|UV 滤镜 52 毫米|19;
                padded camera bag|相机包|69; spare camera battery|相机备用电池|35; 128 GB memory card|128 GB 存储卡|28;
                carbon travel tripod|碳纤维三脚架|149; lens cleaning kit|镜头清洁套装|14; leather camera strap|真皮相机背带|39""",
            ),
            _shelf(
                "gaming",
                "电竞",
                """mechanical keyboard|机械键盘|99; gaming mouse|游戏鼠标|59; extended mouse pad|加大鼠标垫|22; gaming headset|游戏耳麦|85;
                wireless game controller|无线手柄|65; controller charging dock|手柄充电座|27; keycap set|键帽套装|34;
                monitor light bar|屏幕挂灯|49; ergonomic gaming chair|电竞椅|259""",
            ),
        ),
    ),
    Department(
        Name("beauty", "美妆"),
        (Name("Purely", "素颜"), Name("Lumea", "露美"), Name("Botanique No. 9", "植萃九号")),
        (
            _shelf(
                "skincare",
                "护肤",
                """gentle foaming cleanser|温和洁面泡沫|14; hydrating toner|保湿爽肤水|18; vitamin C serum|维 C 精华|34;
                hyaluronic moisturiser|玻尿酸面霜|29; mineral sunscreen SPF 50|物理防晒霜 SPF50|24; overnight repair mask|修护睡眠面膜|27;
                eye contour cream|眼霜|32; clay face mask|清洁泥膜|19; jade face roller|玉石按摩滚轮|21""",
            ),
            _shelf(
                "haircare",
                "护发",
                """sulphate-free shampoo|无硫洗发水|16; nourishing conditioner|滋养护发素|17; argan hair oil|坚果护发精油|25;
                deep repair hair mask|深层修护发膜|23; detangling brush|顺发梳|14; ionic hair dryer|负离子吹风机|89;
                heat protection spray|隔热喷雾|18; ceramic hair straightener|陶瓷直发夹|65; silk pillowcase|真丝枕套|45""",
            ),
            _shelf(
                "makeup",
                "彩妆",
                """light cover foundation|轻薄粉底液|28; blending sponge|美妆蛋|9; setting powder|定妆散粉|24; volume mascara|浓密睫毛膏|19;
                eyeshadow palette|眼影盘|42; eyeshadow brush set|眼影刷套装|33; satin lipstick|缎光口红|22; lip liner|唇线笔|12;
                micellar makeup remover|卸妆水|15""",
            ),
        ),
    ),
    Department(
        Name("baby", "母婴"),
        (Name("Tinytots", "小豆丁"), Name("Little Willow", "小柳"), Name("Nidelle", "尼黛儿")),
        (
            _shelf(
                "nursery",
                "婴儿房",
                """convertible cot|可变婴儿床|279; cot mattress|婴儿床垫|99; fitted cot sheets, 2 pack|床笠 2 条|24;
                baby sleeping bag|婴儿睡袋|37;
                video baby monitor|婴儿监护器|129; white noise night light|白噪音小夜灯|33; changing mat|换尿布垫|27;
                nappy caddy organiser|尿布收纳篮|22; musical cot mobile|音乐床铃|39""",
            ),
            _shelf(
                "feeding",
                "喂养",
                """anti-colic bottles, set of 3|防胀气奶瓶 3 只|29; bottle brush|奶瓶刷|9; steam steriliser|蒸汽消毒器|59;
                bottle warmer|暖奶器|38; silicone bibs, 2 pack|硅胶围兜 2 条|16; suction bowl and spoon|吸盘碗勺|18;
                adjustable high chair|可调餐椅|119; baby food blender|辅食机|69; sippy cup|学饮杯|11""",
            ),
            _shelf(
                "toys",
                "玩具",
                """wooden stacking rings|木制叠叠圈|17; shape sorter|形状配对盒|21; soft fabric books|布书|15; play gym mat|健身架游戏毯|55;
                wooden train set|木制小火车|48; extra railway tracks|火车轨道扩展包|26; bath toys, set of 6|洗澡玩具 6 件|14;
                plush elephant|毛绒小象|23; building blocks, 100 pieces|积木 100 块|34""",
            ),
        ),
    ),
    Department(
        Name("pets", "宠物"),
        (Name("Pawsome", "爪爪"), Name("Barkley", "巴克利"), Name("Fauna & Co", "法娜")),
        (
            _shelf(
                "dogs",
                "狗狗",
                """padded dog harness|软垫胸背带|32; reflective lead 2 m|反光牵引绳 2 米|17; poop bags, 120 pack|拾便袋 120 个|9;
                orthopaedic dog bed|记忆棉狗窝|74; grain-free dry dog food 5 kg|无谷狗粮 5 公斤|42; dental chew sticks|洁齿棒|12;
                rubber fetch ball|橡胶弹力球|8; slow feeder bowl|慢食碗|16; dog grooming brush|狗狗梳毛刷|15""",
            ),
            _shelf(
                "cats",
                "猫咪",
                """covered litter box|封闭猫砂盆|45; clumping cat litter 10 l|结团猫砂 10 升|14; litter mat|猫砂垫|18;
                cat tree 150 cm|猫爬架 150 厘米|109;
                sisal scratching post|剑麻猫抓柱|33; feather wand toy|羽毛逗猫棒|9; salmon cat food, 12 pouches|三文鱼猫粮 12 包|16;
                pet water fountain|宠物饮水机|39; cat carrier bag|猫包|47""",
            ),
            _shelf(
                "aquarium",
                "水族",
                """60-litre glass aquarium|60 升玻璃鱼缸|119; external filter|外置过滤器|79; aquarium heater|加热棒|29;
                LED aquarium light|水族灯|54;
                natural gravel 5 kg|天然底砂 5 公斤|13; live plant fertiliser|水草肥|12; water test kit|水质测试盒|24;
                tropical flake food|热带鱼薄片饲料|8; algae scraper|除藻刮刀|15""",
            ),
        ),
    ),
)

SERIES = (
    Name("Origin", "初心"),
    Name("Meadow", "原野"),
    Name("Studio", "工坊"),
    Name("Aurora", "极光"),
    Name("Classic", "经典"),
    Name("Nimbus", "云端"),
    Name("Terra", "大地"),
    Name("Essential", "基础"),
    Name("Pulse", "脉动"),
    Name("Heritage", "传承"),
    Name("Lumi", "微光"),
    Name("Summit", "峰顶"),
)

# Further editions of a good, when more items are wanted than there are goods of brands; the first has no name.
EDITIONS = (
    Name("", ""),
    Name("ocean blue", "海蓝"),
    Name("forest green", "森林绿"),
    Name("sand", "沙色"),
    Name("graphite", "石墨灰"),
    Name("rose", "玫瑰粉"),
    Name("ivory", "象牙白"),
    Name("terracotta", "陶土红"),
)

DESCRIPTIONS = {
    "en": (
        "A {good} from the {series} series by {brand}. Made to last, with a two-year guarantee.",
        "{brand} {series}: a {good} that does its job quietly, day after day.",
        "Designed by {brand} for everyday use. Goes well with everything else in the {series} series.",
        "Our most asked-for {good} in the {series} line, tested by customers for a year.",
    ),
    "zh": (
        "{brand}{series}系列{good}，经久耐用，两年质保。",
        "{brand}{series}：日复一日，安静可靠的{good}。",
        "{brand}为日常使用而设计，可与{series}系列其他产品搭配。",
        "{series}系列中最受欢迎的{good}，经顾客一年实测。",
    ),
}

# Reviews by rating, 1 to 5.
REVIEWS = {
    "en": (
        ("Broke within a week, very disappointed.", "Not as described, sending it back."),
        ("Feels cheaper than the price suggests.", "Does the job, but only just."),
        ("It is fine, nothing special.", "Average quality, quick delivery."),
        ("Good value, I would buy it again.", "Works well, the instructions could be better."),
        ("Exactly what I was looking for, love it.", "Excellent quality, already recommended it to friends."),
    ),
    "zh": (
        ("用了一周就坏了，很失望。", "与描述不符，准备退货。"),
        ("质感配不上这个价格。", "勉强能用。"),
        ("还行，没什么特别。", "质量一般，发货快。"),
        ("性价比不错，会回购。", "好用，说明书可以再清楚些。"),
        ("正是我想要的，非常喜欢。", "质量很好，已经推荐给朋友。"),
    ),
}

MESSAGES = {
    "en": (
        "Is the {title} in stock in your store?",
        "When will my {title} arrive?",
        "Does the {title} come with a guarantee?",
        "Can I return the {title} if it does not fit?",
    ),
    "zh": ("请问门店有{title}现货吗？", "我的{title}什么时候到货？", "{title}有质保吗？", "{title}不合适可以退吗？"),
}

# What people with a taste for each shelf say of it, in the order of the shelves: never the name of a good, and hardly that of the shelf.
INTERESTS = (
    (Name("a slow cup before work", "上班前慢慢冲一杯"), Name("my little espresso corner", "家里的小咖啡角")),
    (Name("frying and stewing on weeknights", "平日煎炒炖煮"), Name("a proper one-pot dinner", "一锅出的晚饭")),
    (Name("sourdough on Sundays", "周日烤酸面包"), Name("birthday cakes for the kids", "给孩子做生日蛋糕")),
    (Name("growing my own on the balcony", "阳台上自己种菜"), Name("raising seedlings", "育苗")),
    (Name("cutting back the roses", "修剪玫瑰"), Name("keeping hedges and beds tidy", "打理篱笆和花圃")),
    (Name("grilling with friends", "和朋友烤肉"), Name("smoked ribs in summer", "夏天的烟熏排骨")),
    (Name("training for a half marathon", "备战半程马拉松"), Name("jogging after dark", "夜跑")),
    (Name("stretching in the morning", "早晨拉伸"), Name("winding down before bed", "睡前放松")),
    (Name("commuting on two wheels", "骑车通勤"), Name("long rides at weekends", "周末长途骑行")),
    (Name("nights under canvas", "露营过夜"), Name("a weekend by the lake", "湖边的周末")),
    (Name("walking in the hills", "爬山"), Name("wet days on the trail", "雨天走山路")),
    (Name("casting for pike", "钓狗鱼"), Name("quiet hours on the river bank", "河边安静的时光")),
    (Name("listening to old records", "听老唱片"), Name("music on the train", "火车上听音乐")),
    (Name("portraits and landscapes", "拍人像和风景"), Name("shooting at night", "拍夜景")),
    (Name("evenings online with friends", "晚上和朋友开黑"), Name("ranked matches", "打排位赛")),
    (Name("dry skin in winter", "冬天皮肤干"), Name("a gentle evening routine", "温和的晚间护理")),
    (Name("taming my curls", "打理卷发"), Name("repairing bleached hair", "修复漂染受损的头发")),
    (Name("a natural look for the office", "上班的自然妆"), Name("a party look", "派对妆容")),
    (Name("getting the little one to sleep", "哄宝宝睡觉"), Name("a room for the new baby", "给新生儿布置房间")),
    (Name("starting solids", "开始添加辅食"), Name("night feeds", "夜里喂奶")),
    (Name("keeping a toddler busy", "让幼儿有事可做"), Name("rainy afternoons with the kids", "雨天陪孩子")),
    (Name("long walks with the puppy", "带小狗长走"), Name("a greedy spaniel", "贪吃的小猎犬")),
    (Name("two indoor tabbies", "两只室内狸花"), Name("a kitten that claws everything", "到处乱抓的小猫")),
    (Name("keeping neon tetras", "养霓虹灯鱼"), Name("clear water for the shrimp", "虾缸要清水")),
)

# Requests for nothing in particular, by the level of the brands that the customer likes: cheap, middle, dear.
WISHES = {
    "en": (
        ("Do you have anything cheap for {}?", "On a tight budget: what would help with {}?"),
        ("What would you suggest for {}?", "I am looking for something for {}."),
        ("I want the best there is for {}.", "Money is no object: what do you have for {}?"),
    ),
    "zh": (
        ("想{}，有便宜点的推荐吗？", "预算不多，{}用什么好？"),
        ("{}有什么推荐？", "想找点适合{}的东西。"),
        ("{}，想要最好的。", "贵一点没关系，{}有什么好东西？"),
    ),
}
