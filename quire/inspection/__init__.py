"""Looking inside a model: what its heads attend to, what its weights weigh. It computes, and never draws."""
