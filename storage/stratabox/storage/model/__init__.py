"""The words: ids, states, records, errors. Standard library only, and nothing of ours."""
