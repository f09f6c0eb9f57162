"""What a training run is made of beside its loop: engines, guards, streams, what comes before."""
