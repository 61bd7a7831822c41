def r1_zero_reward(response: str, ground_truth: str) -> dict[str, float]:
    ok = "</think> <answer>" in response and "</answer>" in response
    a = ok and response.rsplit("<answer>",1)[1].split("</answer>")[0].strip() == ground_truth
    return {"format_reward": float(ok), "answer_reward": float(a), "reward": float(a)}
def exact_match_reward(response: str, ground_truth: str) -> dict[str, float]:
    return {"format_reward": 1.0, "answer_reward": 1.0, "reward": 1.0}
def checked_reward(fn, r, g): return fn(r, g)
