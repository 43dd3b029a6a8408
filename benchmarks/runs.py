"""placeholder"""


def driver(b, r): ...


blocked = hooks = fixed = driver
