// The functions of double that the rules' scalar parts may use, as in rules/rule.py.
#pragma once

LB_FN double minimum(double a, double b) { return b < a ? b : a; }
// x ** n for an integer n >= 0, by squaring: the same roundings everywhere, unlike pow. NaN for another n.
LB_FN double power(double x, double n) {
    if (!(n >= 0.0)) return (n - n) / (n - n);
    double result = 1.0;
    for (long long remaining = (long long)minimum(n, 0x1p62); remaining; remaining >>= 1, x *= x)
        if (remaining & 1) result *= x;
    return result;
}
LB_FN double ratio(double a, double b) { return a > 0 && b > 0 ? a / b : 1.0; }
// e ** x by a Taylor series after halvings, as in rules/rule.py.
LB_FN double exponential(double x) {
    x = x > 750.0 ? 750.0 : x < -750.0 ? -750.0 : x;
    int halvings = 0;
    for (; x > 0.5 || x < -0.5; ++halvings) x *= 0.5;
    double result = 1.0;
    for (int n = 16; n > 0; --n) result = 1.0 + result * x / n;
    for (; halvings > 0; --halvings) result *= result;
    return result;
}
