"""Short captions whose encoding is told from their bytes: 100 Chinese ones in GBK, 100 Western ones in Windows-1252.

    python tests/bench/bench_encodings.py
"""

from __future__ import annotations

from lapwan.data.text_encoding import decode

CHINESE = """
抓钳 剪刀 吸引器 电凝钩 双极 钛夹 戳卡 标本袋 缝线 纱布 止血 切开 冲洗 牵拉 剪断 夹闭 缝合 打结 游离 分离
抓钳牵拉胆囊 剪刀剪断胆囊管 电凝钩分离 吸引器吸血 双极钳止血 持针器缝合 超声刀离断网膜 标本袋取出 术野清晰 肝床渗血
镜头推进 探查腹腔 胆囊三角 胆囊动脉 阑尾系膜 子宫动脉 卵巢囊肿 输卵管 直肠 乙状结肠
電凝鉤 雙極電凝 無損傷抓鉗 剪斷縫線 膽囊床滲血 清除術野積血 縫合 組織鉗 鈦夾 標本袋取出
抓钳grasper牵拉 hook分离 用scissors剪开 suction吸净 clip夹闭cystic 双极bipolar L型钩 3枚钛夹 5mm戳卡 Calot三角
抓钳，牵拉 剪刀（弯） 电凝。止血 吸引；冲洗 “剪刀” 第1步：切开 胆囊——游离 夹闭…… 温度37℃ 约50％
粘连带 钝性分离 锐性切断 烟雾弥漫 焦痂形成 浆膜层 腹膜后 肠系膜 大网膜 小肠
嵴 髂窝 肋缘 脐部 盆腔 膀胱 尿管 肾门 脾脏 胰腺钩突
胃窦 十二指肠 空肠 回盲部 升结肠 肝圆韧带 镰状韧带 膈肌 纵隔 食管
切 剪 吸 夹 缝 钩 钳 镊 线 针
""".split()
WESTERN = """
La pince saisit la vésicule
Le crochet dissèque le péritoine
L’aspirateur évacue le sang
Die Schere schneidet die Brücke
Die Gallenblase wird gelöst
Blutung wird gestoppt – Übersicht
El gancho diseca la vesícula
La tijera corta el conducto cístico
Se coloca el clip en la arteria cística
A pinça segura a vesícula biliar
O bisturi elétrico faz a dissecção
Il gancio seziona il peritoneo perché è teso
naïve view
crème
déjà vu
façade
Ärztliche Übersicht
Öffnung
Größe 5 mm
Schließen der Klammer
café
résumé
piñata
señal
años
coração
ação
über
für
tränkt
Nähen
weiß
straße
élévation
hémostase
œdème
cœur
forêt
hôpital
île
garçon
leçon
où
là
très
après
première
suture « continue »
5–6 mm trocar
the surgeon’s scissors
“hook” dissection
scissors – then suction
temperature 37°C
±2 mm
½ of the duct
The grasper… waits
don’t cut
Calot’s triangle
Müller retractor
Köhler forceps
Pfannenstiel’s incision – closed
Trendelenburg position · 15°
Gallengänge
Häkchen
Zange greift Gefäß
Spülung
Absaugung läuft
Naht hält
trépan
é
aiguille rétractée
ligature nouée
clé
pré-coagulation
vidéo n° 3
étape 1
côlon gauche
rate décollée
artère coupée
fibre tirée
tête du pancréas
conduit biliaire dilaté
façon française
Château
Ångström
sjö
på
blå
kött
Kärl
sårkant
æg
øre
nål
größere Übersicht über die Gefäße
pérennité
créée
Noël
maïs
Zoë’s clip
vérité – fidélité
naïveté
""".strip().splitlines()


def main() -> None:
    """Print how many of both are read as they were written."""
    for texts, encoding in ((CHINESE, "gbk"), (WESTERN, "cp1252")):
        wrong = [text for text in texts if decode(text.encode(encoding))[0] != text]
        print(f"{encoding}: {len(texts) - len(wrong)} of {len(texts)}", *wrong)


if __name__ == "__main__":
    main()
