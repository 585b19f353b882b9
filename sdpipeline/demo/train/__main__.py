"""Train the demo's checkpoints, one stage or all of them."""

if __name__ == "__main__":
    # Imported here alone: the processes that draw start from this module and need none of it.
    from sdpipeline.demo.train.training import main

    main()
