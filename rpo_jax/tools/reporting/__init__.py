"""What a report shows of runs: curves, a batch's contrast matrix, held-out rewards, samples; and the page itself."""
