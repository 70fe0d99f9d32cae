"""The embedded model: `model` builds its folder, `resolve` turns the name `tiny` into it, `scenes` renders its clips,
`evaluators` and `reward` score its videos."""
