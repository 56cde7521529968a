"""Which variables of the environment hold secrets: they go into no file, no command line and no other machine."""

from __future__ import annotations

import re

# A word of the name, as in HF_TOKEN or WANDB_API_KEY; the path of a secret, as in HF_TOKEN_PATH, is none.
SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|SECRETS?|PASSWORD|PASSWD|PASS|CREDENTIALS?|AUTH|API_?KEY|KEY|CONNECTION_STRING)"
    r"(_(?!(PATH|FILE|DIR|SOCK)$)|$)",
    re.I,
)
# A password in a URL, and values that look like the tokens of known services, whatever their name.
SECRET_VALUE = re.compile(
    r"://[^/\s:@]*:[^/\s@]+@|\b(hf|api_org|gh[a-z])_[A-Za-z0-9]{16,}\b|\bgithub_pat_\w{16,}"
    r"|\b(sk|glpat|xox[a-z])-(\w{1,9}-)*[A-Za-z0-9_]{16,}|\bAKIA[A-Z0-9]{16}"
)


def is_secret(name: str, value: str) -> bool:
    return bool(SECRET_NAME.search(name) or SECRET_VALUE.search(value))
