"""From a request to an answer: snapshot, candidates, ranking, policy, slate."""
