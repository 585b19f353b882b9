"""Train the demo's checkpoints, one stage or all of them."""

if __name__ == "__main__":
    # Imported only here: the drawing processes start from this module and do not need it.
    from sdpipeline.demo.train.training import main

    main()
