# @title Pictures
import glob

from IPython.display import Image, display

for pattern in PICTURES:
    for name in sorted(glob.glob(f"{OUTPUT}/{pattern}"))[-4:]:
        print(name)
        display(Image(filename=name))
